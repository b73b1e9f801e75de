"""What disturbances are done to: the processes of attention workers and of the engine, and links."""

from __future__ import annotations

import abc
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cores import ATTENTION_CPU
from layouts import EMBEDDED, HOSTS, Layout
from network import PORT, Host
from server import VllmServer
from worker_processes import Worker, worker_process

EMBEDDED_WORKER = r"vllm_lamina\.worker\.attention_worker"
ENGINE = r"^VLLM::(EngineCore|Worker)"

WORKER_MEMORY = "32MiB"
"""Little enough that not all questions are in the prefix cache, and that bursts preempt requests."""


class Paused:
    """Processes that SIGSTOP was sent to; `resume` reaches them and no others, which may have their ids by then."""

    def __init__(self, pids: list[int]) -> None:
        self._pidfds = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self._pidfds.append(os.pidfd_open(pid))
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT to those that still live. May be called twice."""
        self._send(signal.SIGCONT)
        for pidfd in self._pidfds:
            os.close(pidfd)
        self._pidfds = []

    def _send(self, number: int) -> None:
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)


class Victim(abc.ABC):
    """An attention worker."""

    host: Host | None = None
    """Where its link can be cut."""

    @property
    @abc.abstractmethod
    def pid(self) -> int | None:
        """None while there is no process."""

    @abc.abstractmethod
    def kill(self) -> bool:
        """SIGKILL; whether there was a process."""

    def pause(self) -> Paused:
        return Paused([self.pid] if self.pid is not None else [])


class EmbeddedVictim(Victim):
    """The engine starts it and starts it again."""

    def __init__(self, server: VllmServer) -> None:
        self._server = server

    @property
    def pid(self) -> int | None:
        return next(iter(matching(self._server, EMBEDDED_WORKER)), None)

    def kill(self) -> bool:
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid is not None


class RemoteVictim(Victim):
    """`vllm-lamina worker`, always at the same address; each start has a log of its own in `directory`."""

    def __init__(
        self, directory: Path, name: str, address: str, arguments: tuple[str, ...], host: Host | None
    ) -> None:
        self.address, self.host = address, host
        self._directory, self._name, self._arguments = directory, name, arguments
        self._starts = 0
        self._running = ExitStack()
        self._worker: Worker | None = None

    @property
    def pid(self) -> int | None:
        return self._worker.process.pid if self._worker is not None else None

    def start(self) -> None:
        """Also after `kill`; returns when it is ready for an engine."""
        log = self._directory / f"{self._name}.{self._starts}.log"
        self._starts += 1
        prefix = self.host.prefix if self.host is not None else ()
        process = worker_process(log, self.address, *self._arguments, prefix=prefix)
        self._worker = self._running.enter_context(process)

    def kill(self) -> bool:
        was_there = self._worker is not None
        self._worker = None
        self._running.close()
        return was_there

    def stop(self, deadline: float = 15.0) -> str | None:
        """SIGTERM, when the engine has left; what is wrong with how it ended."""
        if self._worker is None:
            return f"{self._name} was not running in the end"
        process = self._worker.process
        process.terminate()
        try:
            status = process.wait(deadline)
        except subprocess.TimeoutExpired as error:
            return f"{self._name} did not end: {error}"
        finally:
            self.kill()
        return f"{self._name} ended with status {status}" if status else None


@contextmanager
def remote_victims(
    layout: Layout, hosts: list[Host], secret: Path, directory: Path
) -> Iterator[list[RemoteVictim]]:
    """The layout's workers, running; none where the engine starts its own."""
    arguments: tuple[str, ...] = ("--memory", WORKER_MEMORY, "--cpus", ATTENTION_CPU)
    if layout.network == HOSTS:
        arguments += ("--secret-file", str(secret))
    count = 0 if layout.workers == EMBEDDED else layout.num_machines
    found = []
    with ExitStack() as stack:
        for index in range(count):
            host = hosts[index] if layout.network == HOSTS else None
            address = f"{host.address}:{PORT}" if host is not None else f"127.0.0.1:{_lasting_port()}"
            victim = RemoteVictim(directory, f"worker{index}", address, arguments, host)
            stack.callback(victim.kill)
            victim.start()
            found.append(victim)
        yield found


def _lasting_port() -> int:
    """A free port that no client's connection takes while its worker is away."""
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(10_000, 32_000))) as probe,
        ):
            port: int = probe.getsockname()[1]
            return port


def matching(server: VllmServer, pattern: str) -> list[int]:
    """Ids of the server's processes whose command line matches."""
    return [pid for pid, command in server.session_processes().items() if re.search(pattern, command)]
