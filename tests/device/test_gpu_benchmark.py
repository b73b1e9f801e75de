"""What `scripts/gpu.sh` measures, as far as it runs without a GPU, and what becomes of a part that breaks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import ENGINE_ENV
from runners import V2, environment

from benchmarks import gpu, gpu_setup
from benchmarks.gpu_engines import compare
from vllm_lamina import _native

PROGRAM = Path(__file__).with_name("gpu_on_cpu.py")
TESTS = PROGRAM.parent.parent


Run = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Measures parts: the rows of each, of which there is a table too."""
    for name, value in (ENGINE_ENV | environment(V2)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}:{TESTS}:{os.environ['PYTHONPATH']}")
    monkeypatch.setattr(gpu_setup, "PROGRAM", [sys.executable, str(PROGRAM)])
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(gpu.LIMITS, 800))

    def run(*parts: str) -> dict[str, list[dict[str, Any]]]:
        monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path), "--parts", *parts])
        gpu.main()
        return check_written(tmp_path, capsys.readouterr().out, parts)

    return run


def check_written(directory: Path, printed: str, parts: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    written = json.loads((directory / "gpu.json").read_text())
    table = (directory / "gpu.md").read_text()
    assert table in printed
    assert f"GPU: {written['machine']['GPU']}" in table
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    for part, row in written["rows"]:
        assert "error" not in row, row
        rows[part].append(row)
        assert f"**{part}**" in table
    return rows


def test_what_the_exchange_costs(run: Run) -> None:
    rows = run("words", "exchange")
    assert [(row["by"], row["captured"]) for row in rows["words"]] == [("thread", False), ("thread", True)]
    assert all(row["us"] > 0 for row in rows["words"])
    assert [(row["batch"], row["lanes"], row["captured"]) for row in rows["exchange"]] == [
        (2, 1, False),
        (2, 2, False),
        (2, 1, True),
        (2, 2, True),
    ]
    assert all(0 < row["of these attention"] < row["layer us"] for row in rows["exchange"])


@pytest.mark.slow
def test_engines(run: Run) -> None:
    rows = run("equality", "steps")
    assert [(row["system"], row["equal"]) for row in rows["equality"]] == [
        ("one lane", "6 of 6"),
        ("two lanes", "6 of 6"),
    ]
    assert all(row["log-probabilities apart"] < 1e-4 for row in rows["equality"])
    assert [row["system"] for row in rows["steps"]] == ["stock", "one lane", "two lanes"]
    assert all(row["step ms"] > 0 for row in rows["steps"])


BROKEN = """
import sys, time
part = sys.argv[-1]
print('{"part": "%s"}' % part, flush=True)
if part == "words":
    time.sleep(600)
if part == "exchange":
    sys.exit(3)
"""


def test_a_part_that_breaks_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_setup, "PROGRAM", [sys.executable, "-c", BROKEN])
    monkeypatch.setattr(gpu, "LIMITS", {"words": 5, "exchange": 60, "equality": 70})
    over: dict[float, Callable[[], None]] = {}

    class Limit:
        """A timer whose time is over when the test says so."""

        def __init__(self, seconds: float, function: Callable[[], None]) -> None:
            over[seconds] = function

        def start(self) -> None:
            pass

        def cancel(self) -> None:
            pass

    monkeypatch.setattr(gpu.threading, "Timer", Limit)
    rows: list[tuple[str, dict[str, Any]]] = []

    def report(part: str, row: dict[str, Any]) -> None:
        rows.append((part, row))
        if row == {"part": "words"}:
            over[gpu.LIMITS["words"]]()

    gpu.run_parts(["words", "exchange", "equality"], report)
    assert rows == [
        ("words", {"part": "words"}),
        ("words", {"error": "not over after 5 s"}),
        ("exchange", {"part": "exchange"}),
        ("exchange", {"error": "status 3"}),
        ("equality", {"part": "equality"}),
    ]
    assert "| exchange |  |\n|  | status 3 |" in gpu.page({"GPU": "none"}, rows)


@pytest.mark.slow
def test_script(tmp_path: Path) -> None:
    """From a bare checkout to the results, where building is copying, and no part finds what it asks."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    for name in ("scripts/gpu.sh", "pyproject.toml"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TESTS.parent / name, checkout / name)
    for name in ("benchmarks", "vllm_lamina"):
        shutil.copytree(TESTS.parent / name, checkout / name, ignore=shutil.ignore_patterns("*.so"))
    programs.mkdir()
    build = f"mkdir -p build/gpu && cp {_native.__file__} build/gpu/"
    for name, script in (("nvidia-smi", "echo none"), ("cmake", build)):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    path = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
    env = os.environ | {"PATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([checkout / "scripts" / "gpu.sh", "--parts", "words"], check=True, env=env)
    written = json.loads((checkout / "results" / "gpu.json").read_text())
    assert written["rows"] == [["words", {"error": "status 1"}]]
    assert list((checkout / "vllm_lamina").glob("_native*.so"))
    [points] = checkout.glob("vllm_lamina-*.dist-info/entry_points.txt")
    assert "[vllm.general_plugins]\nlamina = " in points.read_text()


def test_all_parts_have_limits() -> None:
    """Eight minutes together."""
    assert gpu.LIMITS.keys() == gpu.PARTS.keys()
    assert sum(gpu.LIMITS.values()) <= 8 * 60


def test_equality_counts_up_to_the_first_difference() -> None:
    expected = [[[1, 2, 3], [-0.5, -0.25, -1.0]], [[7, 8], [-1.0, -2.0]]]
    same = [[[1, 2, 3], [-0.5, -0.25, -1.0]], [[7, 8], [-1.0, -2.5]]]
    assert compare(expected, same) == {"equal": "2 of 2", "log-probabilities apart": 0.5}
    other = [[[1, 5, 3], [-0.5, -9.0, -9.0]], [[7, 8], [-1.0, -2.0]]]
    assert compare(expected, other) == {"equal": "1 of 2", "log-probabilities apart": 0.0}
