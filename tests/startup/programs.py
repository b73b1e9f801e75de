"""Runs a program of the package or of vLLM for a test, with a deadline, and notices processes that outlive it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server import SERVER_ENV

_MODULES = {"vllm": "vllm.entrypoints.cli.main", "vllm-lamina": "vllm_lamina.cli"}

# One model worker on CPU 0, the attention worker on another.
TINY_ENGINE = ("--dtype", "float32", "--max-model-len", "512", "--gpu-memory-utilization", "0.1")
LAMINA = ("--executor", "lamina", "--lamina-memory", "64MiB")


@dataclass(frozen=True)
class Finished:
    """How a program ended."""

    status: int
    output: str

    @property
    def last_line(self) -> str:
        return self.output.rstrip().rpartition("\n")[2]


def console(name: str, *arguments: str) -> list[str]:
    """The command of a console script: the one of this environment, or its module where it is not installed."""
    script = Path(sys.executable).with_name(name)
    start = [str(script)] if script.exists() else [sys.executable, "-m", _MODULES[name]]
    return [*start, *arguments]


def program(name: str, *arguments: str) -> list[str]:
    """The command of a program beside this file."""
    return [sys.executable, str(Path(__file__).with_name(name)), *arguments]


def run(command: Sequence[str], log: Path, deadline: float = 180.0, **env: str) -> Finished:
    """Wait for a program's end; nothing that it started may be left."""
    with running(command, log, **env) as process:
        try:
            status = process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline:g} s\n{tail(log)}") from None
        assert not wait_until_gone(process.pid), f"left processes behind\n{tail(log)}"
    return Finished(status, log.read_text(errors="replace"))


@contextmanager
def running(command: Sequence[str], log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, which is killed as a whole in the end; its output goes to `log`."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | SERVER_ENV | {"COLUMNS": "200"} | env,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for pid in session(process.pid):
            with_signal(pid, signal.SIGKILL)
        process.wait()


def session(leader: int) -> dict[int, str]:
    """Process id and command line of the living processes in the session of a process, which may have ended."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        # After the command's name, in parentheses: state, parent, process group, session.
        fields = _read(directory / "stat").rpartition(")")[2].split()
        if len(fields) > 3 and int(fields[3]) == leader and fields[0] != "Z":
            command = _read(directory / "cmdline").replace("\0", " ").strip()
            found[int(directory.name)] = command or _read(directory / "comm").strip()
    return found


def wait_until_gone(leader: int, deadline: float = 30.0) -> dict[int, str]:
    """What is left of a session at the deadline."""
    wait_for(lambda: not session(leader), deadline)
    return session(leader)


def wait_for(condition: Callable[[], object], deadline: float) -> bool:
    """Whether the condition came true before the deadline."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def with_signal(pid: int, signal_number: int) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return


def process_named(processes: dict[int, str], pattern: str) -> int:
    """The one process whose command line matches."""
    [pid] = [pid for pid, command in processes.items() if re.search(pattern, command)]
    return pid


def tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _read(path: Path) -> str:
    """The file's text; empty if its process has just ended."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
