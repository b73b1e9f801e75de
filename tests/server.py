"""Runs `vllm serve` for a test and notices what it leaves behind."""

from __future__ import annotations

import getpass
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cores import BIND

SERVER_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def short_directory() -> tempfile.TemporaryDirectory[str]:
    """For temporary files: vLLM puts sockets there, whose paths have 107 characters at most."""
    return tempfile.TemporaryDirectory(prefix="lamina-")


_Found = TypeVar("_Found", dict[int, str], set[str])


class ServerFailed(AssertionError):
    """The server did not come up, did not stop, or left something behind; the message ends with its log."""


class VllmServer:
    """`vllm serve MODEL ARGS...` on a free port of `host`, healthy on entry, gone on exit.

    The exit sends SIGTERM and raises ServerFailed if the server does not end, or if it leaves a process or a file in
    shared memory behind. `directory` receives its log. `prefix` before a command runs it where `host` is an address.
    No process is bound to a CPU, unless `environment` says otherwise.
    """

    def __init__(
        self,
        model: str,
        *args: str,
        directory: Path,
        start_deadline: float = 400.0,
        host: str = "127.0.0.1",
        prefix: tuple[str, ...] = (),
        **environment: str,
    ) -> None:
        self.host = host
        self.port = _free_port()
        self.log_file = directory / "server.log"
        self._short = short_directory()
        self.temporary = Path(self._short.name)
        self._start_deadline = start_deadline
        self._environment = SERVER_ENV | BIND | environment
        if "--enforce-eager" in args:
            # vLLM compiles a function of its sampler all the same, which takes seconds.
            self._environment |= {"TORCHDYNAMO_DISABLE": "1"}
        vllm = str(Path(sys.executable).with_name("vllm"))
        self._command = [*prefix, vllm, "serve", model, "--host", host, "--port", str(self.port), *args]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __enter__(self) -> VllmServer:
        self._make_temporary_directory()
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment | {"TMPDIR": str(self.temporary)},
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.stop()
        except ServerFailed:
            if kind is None:  # otherwise the failure inside the block is the one to report
                raise

    def stop(self, deadline: float = 60.0) -> None:
        """Stops the server as a supervisor would, and checks that nothing remains of it."""
        mapped = {inode for pid in self.session_processes() for inode in mapped_shared_memory(pid)}
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            self._kill()
            raise self._failure(f"the server was still running {deadline:g} s after SIGTERM") from None
        processes = _wait_until_empty(self.session_processes)
        if processes:
            self._kill()
            raise self._failure(f"the server left processes behind: {processes}")
        files = _wait_until_empty(lambda: shared_memory_files(mapped))
        if files:
            raise self._failure(f"the server left files in shared memory: {files}")

    def get(self, path: str) -> str:
        """The body of an answer of status 200; raises OSError for any other."""
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=60) as answer:
            body: bytes = answer.read()
            return body.decode()

    def metric(self, name: str) -> float:
        """The value of one of vLLM's metrics that has no labels but those of the engine."""
        [value] = re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", self.get("metrics"), re.MULTILINE)
        return float(value)

    def session_processes(self) -> dict[int, str]:
        """Process id and command line of every living process that the server started."""
        found = {}
        for pid, session in _sessions():
            if session == self.process.pid:
                command = _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()
                found[pid] = command or _read(Path(f"/proc/{pid}/comm")).strip()
        return found

    def temporary_files(self) -> set[str]:
        """Names of what is in the server's directory for temporary files; a UUID in a name becomes "UUID"."""
        uuid = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}")
        return {uuid.sub("UUID", path.name) for path in self.temporary.iterdir() if not path.is_symlink()}

    def _make_temporary_directory(self) -> None:
        """An empty directory but for a link to torch's usual cache of compiled code, which takes a minute to fill."""
        cache = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
        cache.mkdir(exist_ok=True)
        (self.temporary / cache.name).symlink_to(cache)

    def _wait_until_healthy(self) -> None:
        end = time.monotonic() + self._start_deadline
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise self._failure(f"the server ended with status {self.process.returncode}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise self._failure(f"the server was not healthy within {self._start_deadline:g} s")

    def kill(self) -> None:
        """Kills every process of the server at once, and removes what they would have removed."""
        mapped = {inode for pid in self.session_processes() for inode in mapped_shared_memory(pid)}
        self._kill()
        _wait_until_empty(self.session_processes)
        for name in shared_memory_files(mapped):
            Path("/dev/shm", name).unlink(missing_ok=True)

    def _kill(self) -> None:
        for pid in [self.process.pid, *self.session_processes()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def _failure(self, problem: str) -> ServerFailed:
        tail = "\n".join(self.log_file.read_text(errors="replace").splitlines()[-80:])
        return ServerFailed(f"{problem}\n{tail}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_empty(look: Callable[[], _Found], deadline: float = 60.0) -> _Found:
    """What `look` still finds at the deadline; returns at once when it finds nothing."""
    end = time.monotonic() + deadline
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _sessions() -> Iterator[tuple[int, int]]:
    """Process id and session id of every living process."""
    for directory in Path("/proc").glob("[0-9]*"):
        # After the command's name, in parentheses: state, parent, process group, session.
        fields = _read(directory / "stat").rpartition(")")[2].split()
        if len(fields) > 3 and fields[0] != "Z":
            yield int(directory.name), int(fields[3])


def mapped_shared_memory(pid: int) -> set[int]:
    """Inodes of the files in /dev/shm that the process has mapped.

    Not their names: a semaphore is mapped under a temporary name, and other programs have files there too.
    """
    maps = _read(Path(f"/proc/{pid}/maps"))
    return {int(inode) for inode in re.findall(r" (\d+) +/dev/shm/", maps)}


def shared_memory_files(inodes: set[int]) -> set[str]:
    """Names of the files in /dev/shm with these inodes."""
    return {entry.name for entry in os.scandir("/dev/shm") if entry.inode() in inodes}


def _read(path: Path) -> str:
    """The file's text; empty if its process has just ended."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
