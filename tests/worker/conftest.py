"""Attention worker processes: one, and a connection to it, for each test that asks; four for those of a file."""

import contextlib
import os
from collections.abc import Iterator

import pytest

from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.transport.connection import AttentionWorkerConnection


@pytest.fixture
def worker() -> Iterator[EmbeddedAttentionWorker]:
    worker = EmbeddedAttentionWorker.start(1 << 30)
    yield worker
    worker.stop()


@pytest.fixture
def connection(worker: EmbeddedAttentionWorker) -> Iterator[AttentionWorkerConnection]:
    with AttentionWorkerConnection.connect(worker.address) as connection:
        yield connection


@pytest.fixture(scope="module")
def workers() -> Iterator[list[EmbeddedAttentionWorker]]:
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(4):
            workers.append(EmbeddedAttentionWorker.start(64 << 20, [max(os.sched_getaffinity(0))]))
            stack.callback(workers[-1].stop)
        yield workers
