"""Does something to attention workers once they have served some steps, while an engine generates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cores import ATTENTION_CPU
from engines import Engines
from jobs import Job, JobResult
from worker_processes import Worker, free_port, worker_process

from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import ConnectionFailed

DEADLINE = 600.0  # an engine takes minutes to start where CPUs are shared and kernels are interpreted
EMBEDDED = "vllm_lamina.worker.attention_worker"


def embedded_worker(after: int = 0) -> tuple[int, str]:
    """Process id and address of the embedded worker that a process of this test started, other than ``after``."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                command = (directory / "cmdline").read_text().split("\0")
                ours = _descends_from_us(int(directory.name))
            except OSError:
                continue
            if EMBEDDED in command and ours and int(directory.name) != after:
                return int(directory.name), command[command.index("--listen") + 1]
        time.sleep(0.05)
    raise AssertionError("no embedded attention worker was started")


def wait_for_steps(address: str, steps: int) -> None:
    """Until the worker has served so many steps of its engine."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        try:
            with AttentionWorkerConnection.connect(address, 1.0) as worker:
                if worker.stats().steps >= steps:
                    return
        except ConnectionFailed:
            pass
        time.sleep(0.02)
    raise AssertionError(f"the worker at {address} did not serve {steps} steps")


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Runs the action beside the block; its failure is the block's."""
    with ThreadPoolExecutor(1) as pool:
        done: Future[None] = pool.submit(action)
        yield
        done.result(DEADLINE)


def _descends_from_us(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


class Scene:
    """An engine of its own, and attention workers that can be lost and come back."""

    def __init__(self, directory: Path, job: Job, engines: Engines, stack: ExitStack) -> None:
        self._directory, self._job, self._engines, self._stack = directory, job, engines, stack
        self._count = 0

    def start(self, address: str = "", memory: str = "64MiB") -> Worker:
        """A worker; at the address of one that was lost, where it is given."""
        self._count += 1
        log = self._directory / f"worker{self._count}.log"
        arguments = ("--cpus", ATTENTION_CPU, "--memory", memory)
        return self._stack.enter_context(
            worker_process(log, address or f"127.0.0.1:{free_port()}", *arguments)
        )

    def kill(self, worker: Worker) -> None:
        worker.process.kill()
        worker.process.wait()

    def run(
        self,
        act: Callable[[], None],
        job: Job | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> JobResult:
        """A job, with options of the engine, and what happens meanwhile."""
        job = job or self._job
        engine = job.engine | options
        job = replace(job, executor="lamina", engine=engine, environment=environment or {})
        with meanwhile(act):
            result = self._engines.run(job)
        assert "Lamina" in result.executor
        return result

    @property
    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self._directory.glob("job-*.log")))

    def addresses(self, *workers: Worker) -> str:
        return ",".join(worker.address for worker in workers)
