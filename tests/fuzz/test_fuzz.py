"""A short run of each fuzzer with what a fresh machine has: g++, no libFuzzer. docs/fuzzing.md has the long ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMES = 15_000
REQUESTS = 1500


@pytest.fixture(scope="module")
def fuzz_build() -> Path:
    """The standalone fuzzer and the stress program under ASan and UBSan; kept in the checkout."""
    build = ROOT / "build" / "fuzz" / "test"
    options = ["-DLAMINA_FUZZ=ON", "-DLAMINA_ISA_VARIANTS=OFF", "-DLAMINA_SANITIZE=address,undefined"]
    run("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options, CXX="g++")
    run("ninja", "-C", str(build), "fuzz_frames_standalone", "stress")
    return build / "fuzz"


def run(*command: str, **environment: str) -> str:
    # vLLM, imported by other tests, preloads allocators, and a sanitizer's runtime must come first.
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**inherited, **environment}
    )
    assert ended.returncode == 0, f"{command}: {ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


def test_frames(fuzz_build: Path, tmp_path: Path) -> None:
    """The worker's counts and answers are those of an independent judge, for every frame."""
    output = run(
        str(fuzz_build / "fuzz_frames_standalone"),
        *("--frames", str(FRAMES), "--seed", "20"),
        LAMINA_FUZZ_LAST_INPUT=str(tmp_path / "last-input"),
    )
    numbers = re.match(r"fuzz: (\d+) frames in \d+ programs: (\d+) accepted, (\d+) rejected", output)
    assert numbers is not None
    frames, accepted, rejected = map(int, numbers.groups())
    assert frames >= FRAMES
    assert min(accepted, rejected) > frames // 10, "a fuzzer that only ever hears yes or no tries little"


def test_threads(fuzz_build: Path) -> None:
    """Two lanes over two workers, a channel used from both ends, and the control thread's looks at them."""
    assert "stress:" in run(str(fuzz_build / "stress"), "--seconds", "4")


def test_control_messages() -> None:
    output = run(
        sys.executable, str(ROOT / "fuzz" / "fuzz_control.py"), "--requests", str(REQUESTS), "--seed", "20"
    )
    assert f"{REQUESTS} control messages, each answered" in output
    assert "Refused as no message" in output
