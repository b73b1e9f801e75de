"""However `vllm serve` ends, its workers end with it, and Lamina leaves no file behind."""

from __future__ import annotations

import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
from models import ModelZoo
from programs import (
    LAMINA,
    TINY_ENGINE,
    console,
    process_named,
    running,
    session,
    tail,
    wait_for,
    wait_until_gone,
    with_signal,
)
from server import mapped_shared_memory, shared_memory_files, short_directory

# Of vLLM's queues between its processes: a killed stock vLLM leaves them too.
VLLM_SHARED_MEMORY = re.compile(r"psm_|sem\.")
# Sockets between vLLM's processes, and where its workers found each other: stock vLLM leaves them however it ends.
VLLM_TEMPORARY = re.compile(r"[0-9a-f-]{36}|vllm_dist_[0-9a-f]{32}")


@contextmanager
def serving(model: str, log: Path, temporary: str) -> Iterator[Popen[bytes]]:
    """A healthy server with a temporary directory of its own, whatever becomes of it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = console("vllm", "serve", model, "--host", "127.0.0.1", "--port", port)
    command += [*TINY_ENGINE, "--enforce-eager", *LAMINA]

    def is_healthy() -> bool:
        assert process.poll() is None, tail(log)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    with running(command, log, TMPDIR=temporary, TORCHDYNAMO_DISABLE="1") as process:
        assert wait_for(is_healthy, 180.0), tail(log)
        yield process


def left_in_shared_memory(inodes: set[int]) -> set[str]:
    """Files in shared memory with these inodes that are not of vLLM."""
    return {name for name in shared_memory_files(inodes) if not VLLM_SHARED_MEMORY.match(name)}


@pytest.mark.parametrize(
    ("victim", "signal_number"),
    [
        pytest.param("vllm serve", signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),
        pytest.param("vllm serve", signal.SIGKILL, id="SIGKILL"),
        pytest.param(
            "VLLM::EngineCore", signal.SIGKILL, id="SIGKILL of the engine core", marks=pytest.mark.slow
        ),
    ],
)
def test_nothing_is_left(
    model_zoo: ModelZoo, tmp_path: Path, victim: str, signal_number: signal.Signals
) -> None:
    log = tmp_path / "log"
    with short_directory() as temporary:
        with serving(model_zoo("llama"), log, temporary) as server:
            mapped = {inode for pid in session(server.pid) for inode in mapped_shared_memory(pid)}
            engine_core = process_named(session(server.pid), "^VLLM::EngineCore")
            with_signal(server.pid if victim == "vllm serve" else engine_core, signal_number)
            assert wait_for(lambda: server.poll() is not None, 30.0), tail(log)
            left = wait_until_gone(server.pid)
            assert not left, f"{left}\n{tail(log)}"
        if signal_number == signal.SIGINT:
            assert server.returncode == 0
        assert wait_for(lambda: not left_in_shared_memory(mapped), 10.0), left_in_shared_memory(mapped)
        names = {path.name for path in Path(temporary).iterdir()}
        assert {name for name in names if not VLLM_TEMPORARY.fullmatch(name)} == set()
