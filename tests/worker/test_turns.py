"""Two lanes that take turns: in every layer the step scheduled first reaches the attention worker first."""

import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from engine import Engine, Request

from vllm_lamina._native import AttentionClient, ChannelTimeout
from vllm_lamina.timeline import read_trace
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.messages import Geometry

NUM_LAYERS = 4
STEPS = 60
GEOMETRY = Geometry(NUM_LAYERS, 32, 4, 2, 32, "float32", (0.2,) * NUM_LAYERS)


@pytest.fixture
def client(connection: AttentionWorkerConnection) -> AttentionClient:
    connection.configure(GEOMETRY, 16, ring_bytes=8 << 20, spin_us=20, worker_spin_us=20)
    return connection.client


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
    trace: list[bytes] = []
    recorder = in_thread(lambda: trace.append(connection.trace(6.0)), errors)
    time.sleep(0.2)
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
    for thread in (*lanes, recorder):
        thread.join(30)
    assert not errors
    attended = [s for s in read_trace(trace[0]).slices if s.row == "attention worker"]
    for layer in range(NUM_LAYERS):
        order = [s.lane for s in attended if s.name == f"layer {layer}"]
        assert order == [0, 1] * STEPS


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
    assert 0 < attention <= waiting


def test_another_lane_waits_for_the_turn(client: AttentionClient) -> None:
    client.begin_turn(0, 1.0)
    with pytest.raises(ChannelTimeout, match="did not hand over"):
        client.begin_turn(1, 0.1)
    client.end_turn(0)
    client.begin_turn(1, 1.0)
    client.end_turn(1)
    assert np.isfinite(client.step_times(1)).all()
