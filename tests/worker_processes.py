"""Attention workers in processes of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEADLINE = 15.0
CLI = [sys.executable, "-m", "vllm_lamina.cli"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def cli(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *CLI, *arguments], capture_output=True, text=True, timeout=60.0)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "deadline passed"
        time.sleep(0.02)


def pause(pid: int) -> None:
    """SIGSTOP, and wait until it has reached every thread."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    wait_until(
        lambda: all(
            (task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()
        )
    )


@dataclass
class Worker:
    address: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()


@contextmanager
def worker_process(
    log_file: Path, address: str, *arguments: str, prefix: tuple[str, ...] = ()
) -> Iterator[Worker]:
    """A worker in a process of its own; entered once it listens."""
    command = [*prefix, *CLI, "worker", "--memory", "64MiB", "--listen", address, *arguments]
    with log_file.open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        worker = Worker(address, process, log_file)
        try:
            wait_until(lambda: "listening on" in worker.log or process.poll() is not None)
            assert process.poll() is None, worker.log
            yield worker
        finally:
            process.kill()
