"""A short run of each fuzzer with what a fresh machine has: g++, no libFuzzer. docs/fuzzing.md has the long ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMES = 15_000
PIECES = 200_000
REQUESTS = 1500


@pytest.fixture(scope="module")
def fuzz_build() -> Path:
    """The standalone fuzzers and the stress program under ASan and UBSan; kept in the checkout."""
    build = ROOT / "build" / "fuzz" / "test"
    options = ["-DLAMINA_FUZZ=ON", "-DLAMINA_ISA_VARIANTS=OFF", "-DLAMINA_SANITIZE=address,undefined"]
    run("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options, CXX="g++")
    run("ninja", "-C", str(build), "fuzz_frames_standalone", "fuzz_pieces_standalone", "stress")
    return build / "fuzz"


def run(*command: str, **environment: str) -> str:
    # vLLM, imported by other tests, preloads allocators, and a sanitizer's runtime must come first.
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**inherited, **environment}
    )
    assert ended.returncode == 0, f"{command}: {ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


def fuzz(program: Path, count: int, last_input: Path) -> str:
    """What the program says that it did. If it fails, `last_input` is what it failed on."""
    options = ("--count", str(count), "--seed", "20")
    return run(str(program), *options, LAMINA_FUZZ_LAST_INPUT=str(last_input))


def test_frames(fuzz_build: Path, tmp_path: Path) -> None:
    """The worker's counts and answers are those of an independent judge, for every frame."""
    output = fuzz(fuzz_build / "fuzz_frames_standalone", FRAMES, tmp_path / "last-input")
    numbers = re.match(r"fuzz: (\d+) frames in \d+ programs: (\d+) accepted, (\d+) rejected", output)
    assert numbers is not None
    frames, accepted, rejected = map(int, numbers.groups())
    assert frames >= FRAMES
    assert min(accepted, rejected) > frames // 10, "a fuzzer that only ever hears yes or no tries little"


def test_pieces_of_frames(fuzz_build: Path, tmp_path: Path) -> None:
    """No piece of a frame is written outside of the ring, and a frame is whole only when all of it is there."""
    output = fuzz(fuzz_build / "fuzz_pieces_standalone", PIECES, tmp_path / "last-input")
    numbers = re.match(
        r"fuzz: (\d+) pieces: (\d+) let in, (\d+) refused; frames released: (\d+) whole, (\d+) bad", output
    )
    assert numbers is not None
    pieces, let_in, refused, whole, bad = map(int, numbers.groups())
    assert pieces == let_in + refused >= PIECES
    assert min(let_in, refused) > pieces // 10
    assert min(whole, bad) > pieces // 100


def test_threads(fuzz_build: Path) -> None:
    """Two lanes over two workers, a channel used from both ends, and the control thread's looks at them."""
    assert "stress:" in run(str(fuzz_build / "stress"), "--seconds", "4")


def test_control_messages() -> None:
    output = run(
        sys.executable, str(ROOT / "fuzz" / "fuzz_control.py"), "--requests", str(REQUESTS), "--seed", "20"
    )
    assert f"{REQUESTS} control messages, each answered" in output
    assert "Refused as no message" in output
