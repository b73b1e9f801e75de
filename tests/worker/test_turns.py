"""Two lanes that take turns: in every layer the step scheduled first reaches the attention worker first."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from engine import Engine, Request, client_of_one
from worker_processes import DEADLINE

from vllm_lamina._native import WAIT_BOUNDS, AttentionClient, ChannelTimeout, create_turn_log
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.timeline import read_trace
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.wire.messages import Trace, TraceRequest

NUM_LAYERS = 4
STEPS = 60
GEOMETRY = Geometry.uniform(NUM_LAYERS, 32, 4, 2, 32, "float32", (0.2,) * NUM_LAYERS)


@pytest.fixture
def client(connection: AttentionWorkerConnection) -> AttentionClient:
    connection.configure(GEOMETRY, 16, ring_bytes=8 << 20, spin_us=20, worker_spin_us=20)
    return client_of_one(connection, GEOMETRY)


def run_lane(engine: Engine, blocks: list[int], scheduled: threading.Semaphore, seed: int) -> None:
    """Decode one token a step, with pauses wherever a thread might be held up."""
    rng = random.Random(seed)

    def dawdle() -> None:
        time.sleep(rng.choice([0, 0, 0, 0.001, 0.004]))

    for context in range(STEPS):
        scheduled.acquire()
        dawdle()
        engine.client.begin_turn(engine.lane, 20.0)
        engine.begin_step(1, [Request(context, 1, blocks)])
        for layer in range(NUM_LAYERS):
            dawdle()
            engine.post(layer)
            engine.collect_and_check(layer)
        engine.client.end_turn(engine.lane)


def in_thread(task: Callable[[], None], errors: list[BaseException]) -> threading.Thread:
    def run() -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("seed", range(3))
def test_no_step_passes_one_that_was_scheduled_before(
    connection: AttentionWorkerConnection, client: AttentionClient, seed: int
) -> None:
    """An adversarial schedule: threads are held up at random, and steps are announced far ahead."""
    engines = [Engine(client, GEOMETRY, 16, seed=seed, lane=lane) for lane in range(2)]
    scheduled = [threading.Semaphore(0), threading.Semaphore(0)]
    errors: list[BaseException] = []
    connection._control.request(TraceRequest("start"), Trace)
    lanes = [
        in_thread(
            lambda lane=lane: run_lane(engines[lane], [2 * lane, 2 * lane + 1], scheduled[lane], seed + lane),
            errors,
        )
        for lane in range(2)
    ]
    for _ in range(STEPS):
        for lane in range(2):
            client.join_turn(lane)
            scheduled[lane].release()
    for thread in lanes:
        thread.join(DEADLINE)
    assert not errors
    # A frame is recorded after its answer is sent: the answers to one more step say that all before are.
    engines[0].step(1, [Request(STEPS, 1, [0, 1])])
    trace = connection._control.request(TraceRequest("take"), Trace).events
    attended = [s for s in read_trace(trace).slices if s.row == "attention worker"]
    for layer in range(NUM_LAYERS):
        order = [s.lane for s in attended if s.name == f"layer {layer}"]
        assert order[: 2 * STEPS] == [0, 1] * STEPS


def test_a_lane_that_never_comes_holds_the_other_up_no_longer_than_its_deadline(
    client: AttentionClient,
) -> None:
    client.join_turn(0)
    client.join_turn(1)
    with pytest.raises(ChannelTimeout, match="did not begin in time"):
        client.begin_turn(1, 0.1)
    client.begin_turn(0, 1.0)
    client.end_turn(0)
    client.begin_turn(1, 1.0)
    client.end_turn(1)


def test_a_lane_alone_keeps_its_turn(client: AttentionClient) -> None:
    engine = Engine(client, GEOMETRY, 16)
    client.begin_turn(0, 1.0)
    engine.step(0, [Request(0, 40, [1, 2])])
    engine.step(1, [Request(40, 1, [1, 2])])
    client.end_turn(0)
    waiting, attention = client.step_times(0)
    assert attention > 0, "by the worker's clock"
    counts, waited = client.step_waits(0)
    assert len(counts) == len(WAIT_BOUNDS) + 1
    assert sum(counts) == NUM_LAYERS
    assert 0 < waited <= waiting
    bounds = zip((0.0, *WAIT_BOUNDS), (*WAIT_BOUNDS, np.inf), counts, strict=True)
    lowest, highest = np.sum(
        [(count * low, count * high if count else 0.0) for low, high, count in bounds], axis=0
    )
    assert lowest <= waited <= highest


def test_another_lane_waits_for_the_turn(client: AttentionClient) -> None:
    client.begin_turn(0, 1.0)
    with pytest.raises(ChannelTimeout, match="did not hand over"):
        client.begin_turn(1, 0.1)
    client.end_turn(0)
    client.begin_turn(1, 1.0)
    client.end_turn(1)
    assert np.isfinite(client.step_times(1)).all()


def test_all_ranks_take_the_same_turns() -> None:
    """Lanes of two ranks, held up at random on either: what rank 0 decides, rank 1 follows."""
    errors: list[BaseException] = []
    turns: list[list[int]] = [[], []]
    turn_log = create_turn_log()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, turn_log)
        threads = []
        for rank in range(2):
            worker = EmbeddedAttentionWorker.start(64 << 20)
            stack.callback(worker.stop)
            connection = stack.enter_context(AttentionWorkerConnection.connect(worker.address))
            connection.configure(GEOMETRY, 16, ring_bytes=8 << 20, spin_us=0, worker_spin_us=0)
            engine = Engine.on(connection, GEOMETRY, 16)
            engine.client.share_turns(turn_log, rank)
            for lane in range(2):
                lane_engine = Engine(engine.client, GEOMETRY, 16, seed=lane, lane=lane)
                threads.append(
                    in_thread(
                        lambda engine=lane_engine, rank=rank: run_rank(engine, turns[rank], seed=rank), errors
                    )
                )
        for thread in threads:
            thread.join(60)
    assert not errors
    assert len(turns[0]) == 2 * STEPS * (NUM_LAYERS + 1)
    assert turns[0] == turns[1]


def run_rank(engine: Engine, turns: list[int], seed: int) -> None:
    rng = random.Random(2 * seed + engine.lane)
    blocks = [3 * engine.lane + i for i in range(3)]
    for step in range(STEPS):
        time.sleep(rng.choice((0.0, 0.0, 0.003)))
        engine.client.begin_turn(engine.lane, 20.0)
        turns.append(engine.lane)
        if step == 0:
            engine.begin_step(0, [Request(0, 20, blocks)])
        else:
            engine.begin_step(1, [Request(19 + step, 1, blocks)])
        for layer in range(NUM_LAYERS):
            engine.post(layer)
            time.sleep(rng.choice((0.0, 0.0, 0.001)))
            engine.collect_and_check(layer)
            turns.append(engine.lane)
        engine.client.end_turn(engine.lane)
