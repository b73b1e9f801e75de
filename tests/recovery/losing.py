"""Does something to attention workers once they have served some steps, while an engine generates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

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
