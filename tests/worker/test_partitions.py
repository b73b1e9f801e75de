"""Attention over several attention worker processes, by every partition, against float64."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from engine import Engine, Request
from random_steps import Workload, ranges
from streams import partition_of
from worker_processes import DEADLINE, pause

from vllm_lamina._native import AttentionClient, AttentionWorkerError, ChannelTimeout, Partition
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection

BLOCK_SIZE = 32
SCALES = (0.2, 0.15)
GEOMETRY = Geometry.uniform(2, BLOCK_SIZE, 8, 4, 32, "float32", SCALES)

Connect = Callable[..., tuple[AttentionClient, list[AttentionWorkerConnection]]]


@pytest.fixture
def connect(workers: list[EmbeddedAttentionWorker]) -> Iterator[Connect]:
    """`connect("heads", [1, 3], num_blocks=30)` or `connect("blocks", [20, 40])` configures so many workers."""
    with contextlib.ExitStack() as stack:

        def configure(
            kind: str, shares: list[int], *, num_blocks: int = 0, dtype: str = "float32"
        ) -> tuple[AttentionClient, list[AttentionWorkerConnection]]:
            connections = []
            for worker, share in zip(workers, shares, strict=False):
                connection = stack.enter_context(AttentionWorkerConnection.connect(worker.address))
                kv_heads = share if kind == "heads" else GEOMETRY.caches[0].num_kv_heads
                connection.configure(
                    geometry(dtype, kv_heads),
                    num_blocks if kind == "heads" else share,
                    ring_bytes=4 << 20,
                    spin_us=0,
                    worker_spin_us=0,
                    heartbeat_timeout=DEADLINE,
                )
                connections.append(connection)
            partition = partition_of(geometry(dtype), kind, shares)
            return AttentionClient([connection.channel for connection in connections], partition), connections

        yield configure


def geometry(dtype: str = "float32", kv_heads: int = GEOMETRY.caches[0].num_kv_heads) -> Geometry:
    return Geometry.uniform(2, BLOCK_SIZE, 2 * kv_heads, kv_heads, 32, dtype, SCALES)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("padding", [0, 16])
@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("heads", [4]),
        ("heads", [1, 3]),
        ("heads", [2, 1, 1]),
        ("heads", [1, 1, 1, 1]),
        ("blocks", [60]),
        ("blocks", [30, 30]),
        ("blocks", [50, 9, 1]),
        ("blocks", [16, 13, 20, 11]),
    ],
)
def test_random_steps(connect: Connect, kind: str, shares: list[int], padding: int, dtype: str) -> None:
    client, connections = connect(kind, shares, num_blocks=60, dtype=dtype)
    pieces = ranges(shares) if kind == "blocks" else ranges([60])
    workload = Workload(Engine(client, geometry(dtype), 60), pieces, seed=len(shares))
    for _ in range(40):
        workload.step(padding)
    for connection in connections:
        assert connection.stats().tokens_appended > 0
        assert connection.stats().rejected_frames == 0


@pytest.mark.parametrize(("kind", "shares"), [("heads", [1, 3]), ("blocks", [31, 20, 9])])
def test_one_thread_per_lane(connect: Connect, kind: str, shares: list[int]) -> None:
    client, _ = connect(kind, shares, num_blocks=60)
    pieces = ranges(shares) if kind == "blocks" else ranges([60])
    failures: list[BaseException] = []

    def run(lane: int) -> None:
        engine = Engine(client, GEOMETRY, 60, seed=lane, lane=lane)
        # Lanes have blocks of their own.
        workload = Workload(engine, [piece[lane::3] for piece in pieces], seed=lane)
        try:
            for _ in range(40):
                workload.step()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run, args=(lane,)) for lane in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    assert not failures


def test_a_worker_without_a_part_gets_no_message(connect: Connect) -> None:
    client, connections = connect("blocks", [10, 10, 10])
    engine = Engine(client, GEOMETRY, 30)
    engine.step(0, [Request(0, 40, [1, 2])])
    engine.step(1, [Request(40, 1, [1, 2])])
    assert [connection.stats().messages for connection in connections] == [6, 0, 0]
    # The new token lies on another worker than all others: that one gets k, v and q, the third nothing.
    engine.step(0, [Request(41, 23, [1, 2])])
    engine.step(1, [Request(64, 1, [1, 2, 25])])
    assert [connection.stats().messages for connection in connections] == [12, 0, 3]
    assert [connection.stats().tokens_appended for connection in connections] == [128, 0, 2]


def test_a_row_that_one_worker_attends_comes_without_lse(connect: Connect) -> None:
    client, connections = connect("blocks", [10, 10])
    engine = Engine(client, GEOMETRY, 20)
    engine.step(0, [Request(0, 40, [1, 2]), Request(0, 40, [3, 13])])
    engine.step(2, [Request(40, 1, [1, 2]), Request(40, 1, [3, 13])])
    row, lse, header = 8 * 32 * 4, 8 * 4, 64
    assert connections[0].stats().bytes_out == 2 * (header + 2 * row + lse)
    assert connections[1].stats().bytes_out == 2 * (header + row + lse)


def test_zero_and_copy_blocks(connect: Connect) -> None:
    client, _ = connect("blocks", [10, 20])
    engine = Engine(client, GEOMETRY, 30)
    engine.step(0, [Request(0, 3 * BLOCK_SIZE, [1, 12, 3])])
    client.copy_blocks(np.array([[1, 9], [12, 29]], np.int32))
    client.zero_blocks(np.array([3, 12], np.int32))

    def tokens(block: int) -> slice:
        return slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)

    for cache in (*engine.k, *engine.v):
        cache[tokens(9)], cache[tokens(29)] = cache[tokens(1)], cache[tokens(12)]
        cache[tokens(3)] = cache[tokens(12)] = 0
    engine.step(1, [Request(5 * BLOCK_SIZE, 1, [9, 12, 29, 3, 1, 0])])
    with pytest.raises(ValueError, match="block 1 cannot be copied to block 12, which is on another"):
        client.copy_blocks(np.array([[1, 12]], np.int32))


def test_blocks_that_nobody_has(connect: Connect) -> None:
    client, _ = connect("blocks", [10, 10])
    engine = Engine(client, GEOMETRY, 30)
    engine.step(1, [Request(3, 1, [19])])
    for request in (Request(3, 1, [20]), Request(3, 1, [-1]), Request(0, 3, [20])):
        with pytest.raises(ValueError, match="outside the attention workers' 20 blocks"):
            engine.begin_step(int(request.query == 1), [request])
    with pytest.raises(ValueError, match="outside the attention workers' 20 blocks"):
        client.zero_blocks(np.array([20], np.int32))
    engine.step(1, [Request(4, 1, [19])])


def test_partitions_are_checked(connect: Connect) -> None:
    native = GEOMETRY.to_native()
    with pytest.raises(ValueError, match="do not add up to the model's 4"):
        Partition.by_heads(native, [[2], [1]])
    with pytest.raises(ValueError, match="at least one KV head"):
        Partition.by_heads(native, [[4], [0]])
    latent = Geometry.uniform(1, 32, 6, 1, 96, "float32", (0.1,), latent_size=64).to_native()
    with pytest.raises(ValueError, match="query heads do not add up to the model's 6"):
        Partition.by_heads(latent, [[1]])
    with pytest.raises(ValueError, match="at least one KV block"):
        Partition.by_blocks(native, [])
    _, connections = connect("blocks", [10, 10])
    with pytest.raises(ValueError, match="1 channels for a partition over 2 attention workers"):
        AttentionClient([connections[0].channel], Partition.by_blocks(native, [10, 10]))


def test_a_wait_goes_on_where_it_ended(connect: Connect, workers: list[EmbeddedAttentionWorker]) -> None:
    """The first worker has answered when the deadline of the wait for the second one passes."""
    client, _ = connect("blocks", [10, 10])
    engine = Engine(client, GEOMETRY, 20)
    engine.step(0, [Request(0, 40, [1, 12])])
    engine.begin_step(1, [Request(40, 1, [1, 12])])
    pause(workers[1].pid)
    try:
        engine.post(0)
        with pytest.raises(ChannelTimeout):
            client.collect(0, 0, engine.out.ctypes.data, engine.out.strides[0], timeout=0.3)
    finally:
        os.kill(workers[1].pid, signal.SIGCONT)
    engine.collect_and_check(0)
    engine.post(1)
    engine.collect_and_check(1)


def test_an_error_of_one_worker_ends_the_step(connect: Connect) -> None:
    client, connections = connect("heads", [2, 2], num_blocks=10)
    engine = Engine(client, GEOMETRY, 30)
    engine.begin_step(1, [Request(3, 1, [20])])
    engine.post(0)
    with pytest.raises(AttentionWorkerError, match="names a block outside the pool"):
        engine.collect_and_check(0)
    with pytest.raises(ValueError, match="not the oldest"):
        engine.collect_and_check(0)
    client.generation += 1
    engine.step(1, [Request(3, 1, [1])])
    assert [connection.stats().rejected_frames for connection in connections] == [2, 2]
