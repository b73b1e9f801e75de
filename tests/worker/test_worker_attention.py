"""Attention through a real attention worker process, against float64."""

import os
import signal
import threading

import numpy as np
import pytest
from engine import Engine, Request
from worker_processes import DEADLINE, pause

from vllm_lamina._native import ChannelTimeout, FrameTooLarge
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection

NUM_BLOCKS = 40


def geometry(
    dtype: str = "float32", num_heads: int = 8, num_kv_heads: int = 2, head_size: int = 64
) -> Geometry:
    scales = (head_size**-0.5, 0.2)
    return Geometry.uniform(2, 32, num_heads, num_kv_heads, head_size, dtype, scales)  # type: ignore[arg-type]


@pytest.fixture
def engine(connection: AttentionWorkerConnection) -> Engine:
    connection.configure(
        geometry(),
        NUM_BLOCKS,
        ring_bytes=8 << 20,
        spin_us=20,
        worker_spin_us=20,
        heartbeat_timeout=DEADLINE,
    )
    return Engine.on(connection, geometry(), NUM_BLOCKS)


def test_prefill_then_decode(engine: Engine) -> None:
    engine.step(0, [Request(0, 50, [3, 9])])
    for context in range(50, 64):
        engine.step(1, [Request(context, 1, [3, 9])])
    engine.step(1, [Request(64, 1, [3, 9, 0])])


def test_decode_of_the_first_token(engine: Engine) -> None:
    engine.step(1, [Request(0, 1, [5])])


def test_prefill_chunks_attend_their_context(engine: Engine) -> None:
    blocks = [1, 2, 30, 4]
    engine.step(0, [Request(0, 40, blocks[:2])])
    engine.step(0, [Request(40, 33, blocks[:3])])
    engine.step(0, [Request(73, 1, blocks[:3])])
    engine.step(1, [Request(74, 1, blocks)])


@pytest.mark.parametrize("padding", [0, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_mixed_step(connection: AttentionWorkerConnection, dtype: str, padding: int) -> None:
    """Decodes, prefill with and without context in one step, from contiguous and from strided rows."""
    connection.configure(geometry(dtype), NUM_BLOCKS, ring_bytes=8 << 20)
    engine = Engine.on(connection, geometry(dtype), NUM_BLOCKS)
    a, b, c = [7, 8, 9], [39, 0], [11, 12, 13]
    engine.step(0, [Request(0, 64, a[:2]), Request(0, 5, b[:1]), Request(0, 20, c[:1])], padding)
    engine.step(
        2, [Request(64, 1, a), Request(5, 1, b[:1]), Request(0, 37, [20, 21]), Request(20, 60, c)], padding
    )
    engine.step(0, [Request(37, 8, [20, 21]), Request(0, 3, [22]), Request(65, 2, a)], padding)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size"), [(1, 1, 32), (9, 3, 64), (16, 1, 128), (4, 4, 256)]
)
def test_shapes(
    connection: AttentionWorkerConnection, num_heads: int, num_kv_heads: int, head_size: int
) -> None:
    shape = geometry("bfloat16", num_heads, num_kv_heads, head_size)
    connection.configure(shape, NUM_BLOCKS, ring_bytes=8 << 20)
    engine = Engine.on(connection, shape, NUM_BLOCKS)
    engine.step(0, [Request(0, 70, [1, 2, 3])])
    engine.step(1, [Request(70, 1, [1, 2, 3]), Request(64, 3, [1, 2, 4])])


def test_prefix_filled_by_another_request_of_the_same_step(engine: Engine) -> None:
    """The second request's context is what the first one's chunk stores in this very step."""
    engine.step(0, [Request(0, 32, [6]), Request(32, 10, [6, 7])])


def test_reused_blocks_keep_nothing(engine: Engine) -> None:
    engine.step(0, [Request(0, 64, [14, 15])])
    engine.step(1, [Request(0, 1, [15])])
    engine.step(1, [Request(1, 1, [15])])


def test_tokens_that_are_not_stored(engine: Engine) -> None:
    engine.step(0, [Request(0, 32, [6])])
    engine.step(0, [Request(0, 8, [6])], skip=(2, 7))
    engine.begin_step(1, [Request(8, 1, [6])])


def test_zero_and_copy_blocks(engine: Engine) -> None:
    size = engine.geometry.block_size(0)
    engine.step(0, [Request(0, 3 * size, [1, 2, 3])])
    engine.client.copy_blocks(np.array([[1, 10], [10, 11], [2, 2]], np.int32))
    engine.client.zero_blocks(np.array([2], np.int32))
    for cache in (*engine.k, *engine.v):
        cache[10 * size : 11 * size] = cache[11 * size : 12 * size] = cache[size : 2 * size]
        cache[2 * size : 3 * size] = 0
    engine.step(1, [Request(4 * size, 1, [10, 2, 11, 3, 0])])


def test_lanes_interleave(engine: Engine) -> None:
    """Outputs may be collected in another order than they were asked for."""
    other = Engine(engine.client, engine.geometry, NUM_BLOCKS, seed=1, lane=1)
    engine.step(0, [Request(0, 40, [1, 2])])
    other.step(0, [Request(0, 33, [21, 22])])
    for i in range(5):
        engine.begin_step(1, [Request(40 + i, 1, [1, 2])])
        other.begin_step(1, [Request(33 + i, 1, [21, 22])])
        for layer in range(2):
            engine.post(layer)
            other.post(layer)
            other.collect_and_check(layer)
            engine.collect_and_check(layer)


def test_one_thread_per_lane(engine: Engine) -> None:
    failures: list[BaseException] = []

    def run(engine: Engine, blocks: list[int]) -> None:
        try:
            engine.step(0, [Request(0, 20, blocks)])
            for context in range(20, 64):
                engine.step(1, [Request(context, 1, blocks)])
        except BaseException as error:
            failures.append(error)
            raise

    lanes = [Engine(engine.client, engine.geometry, NUM_BLOCKS, seed=lane, lane=lane) for lane in range(3)]
    threads = [threading.Thread(target=run, args=(lane, [2 * i, 2 * i + 1])) for i, lane in enumerate(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    assert not failures


def test_outputs_of_an_abandoned_step_are_dropped(engine: Engine) -> None:
    engine.step(0, [Request(0, 40, [1, 2])])
    engine.begin_step(1, [Request(40, 1, [1, 2])])
    engine.post(0)
    engine.client.generation += 1
    engine.step(1, [Request(41, 1, [1, 2])])


def test_steps_larger_than_the_channel(engine: Engine) -> None:
    """Frames of several megabytes through a small ring, and one that can never fit."""
    blocks = list(range(1, NUM_BLOCKS))
    for _ in range(3):
        engine.step(0, [Request(0, 1200, blocks)])
        engine.step(0, [Request(0, 10, [0]), Request(600, 300, blocks)])
    with pytest.raises(FrameTooLarge, match="raise ring_bytes or lower max_num_batched_tokens"):
        engine.begin_step(0, [Request(0, 9000, blocks * 8)])


def test_arguments_are_checked(engine: Engine) -> None:
    engine.step(1, [Request(3, 1, [1])])
    client, geometry = engine.client, engine.geometry

    def begin(num_decodes: int, query: list[int], context: list[int], slots: int) -> None:
        table = np.zeros((len(query), 2), np.int32)
        lens = (np.array(query, np.int32), np.array(context, np.int32))
        client.begin_step(0, num_decodes, *lens, [(table, np.zeros(slots, np.int64))])

    with pytest.raises(ValueError, match="request 1 of the step decodes more than one token"):
        begin(2, [1, 2], [4, 4], 3)
    with pytest.raises(ValueError, match="request 0 of the step needs more blocks"):
        begin(1, [1], [64], 1)
    with pytest.raises(ValueError, match="2 entries for 1 query tokens"):
        begin(1, [1], [4], 2)
    with pytest.raises(ValueError, match="num_decodes is 2 of 1"):
        begin(2, [1], [4], 1)
    with pytest.raises(ValueError, match="block tables of 0 groups, the model 1"):
        client.begin_step(0, 0, np.ones(1, np.int32), np.ones(1, np.int32), [])
    with pytest.raises(ValueError, match="lane 8"):
        client.collect(8, 0, 0, 0)
    with pytest.raises(ValueError, match=f"layer {geometry.num_layers} does not exist"):
        client.post(0, geometry.num_layers, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="not the oldest"):
        client.collect(0, 1, 0, 0)
    engine.step(1, [Request(4, 1, [1])])


def test_collect_has_a_deadline(engine: Engine, worker: EmbeddedAttentionWorker) -> None:
    engine.begin_step(1, [Request(3, 1, [1])])
    pause(worker.pid)
    try:
        engine.post(0)
        with pytest.raises(ChannelTimeout):
            engine.client.collect(0, 0, engine.out.ctypes.data, engine.out.strides[0], timeout=0.2)
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    engine.collect_and_check(0)
