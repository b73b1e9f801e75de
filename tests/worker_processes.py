"""Attention workers in processes of their own."""

import ctypes
import errno
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

import pytest

DEADLINE = 60.0
CLI = [sys.executable, "-m", "vllm_lamina.cli"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def cli(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *CLI, *arguments], capture_output=True, text=True, timeout=60.0)


PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WALL = 0x40000000
"""From Linux's headers: Python has no names for them."""


def wait_until(condition: Callable[[], object], deadline: float = DEADLINE) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "deadline passed"
        time.sleep(0.02)


def pause(pid: int) -> None:
    """SIGSTOP, and wait until it has reached every thread."""
    os.kill(pid, signal.SIGSTOP)

    def is_stopped(task: Path) -> bool:
        try:
            return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
        except (FileNotFoundError, ProcessLookupError):  # it had ended
            return True

    wait_until(lambda: all(map(is_stopped, Path(f"/proc/{pid}/task").iterdir())))


@contextmanager
def stuck_thread(pid: int, name: str) -> Iterator[None]:
    """The process's thread of that name stands still, and no other: what a debugger can do."""
    [thread] = [
        int(task.name)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if (task / "comm").read_text().strip() == name
    ]
    _ptrace(PTRACE_SEIZE, thread)
    try:
        _ptrace(PTRACE_INTERRUPT, thread)
        os.waitpid(thread, WALL)
        yield
    finally:
        _ptrace(PTRACE_DETACH, thread)


def _ptrace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, thread, None, None) == 0:
        return
    error = ctypes.get_errno()
    if request == PTRACE_SEIZE and error in (errno.EPERM, errno.ENOSYS):
        pytest.skip(f"this system does not let one trace a process ({os.strerror(error)})")
    raise OSError(error, os.strerror(error))


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
