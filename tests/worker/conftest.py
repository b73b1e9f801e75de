"""An attention worker process, and a connection to it, for each test that asks."""

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
