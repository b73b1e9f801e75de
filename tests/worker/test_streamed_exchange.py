"""Lanes on streams: a step's layers are enqueued as a whole, and no host is in the middle of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from cpu_stream import CpuStream
from engine import Request
from random_steps import Workload, ranges
from streams import StreamedEngine, array_at, partition_of
from worker_processes import DEADLINE, pause, wait_until

from vllm_lamina._native import AttentionClient, FrameTooLarge, StreamedExchange
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection

NUM_LAYERS = 3
NUM_BLOCKS = 60
MAX_TOKENS = 200
GEOMETRY = Geometry.uniform(NUM_LAYERS, 32, 8, 4, 32, "float32", (0.2, 0.15, 0.1))


class Setup:
    """Workers, an exchange over them and a stream for each lane."""

    def __init__(self, stack: contextlib.ExitStack, workers: list[EmbeddedAttentionWorker]) -> None:
        self.stack, self.workers = stack, workers

    def open(
        self,
        kind: str,
        shares: list[int],
        num_lanes: int = 1,
        transport: str = "auto",
        seed: int | None = None,
    ) -> list[StreamedEngine]:
        """A lane each, whose streams dawdle at random if there is a seed."""
        self.shares = [GEOMETRY.with_heads([0], [n]) if kind == "heads" else GEOMETRY for n in shares]
        blocks = [NUM_BLOCKS] * len(shares) if kind == "heads" else shares
        self.connections = [
            self.connect(worker, share, n, transport, num_lanes)
            for worker, share, n in zip(self.workers, self.shares, blocks, strict=False)
        ]
        channels = [connection.channel for connection in self.connections]
        client = AttentionClient(channels, partition_of(GEOMETRY, kind, shares))
        self.client = client
        self.exchange = StreamedExchange(client, num_lanes, MAX_TOKENS, spin_us=200)
        self.exchange.set_timeout(20.0)
        return [self.lane(lane, seed) for lane in range(num_lanes)]

    def connect(
        self,
        worker: EmbeddedAttentionWorker,
        share: Geometry,
        num_blocks: int,
        transport: str,
        num_lanes: int,
    ) -> AttentionWorkerConnection:
        connection = self.stack.enter_context(AttentionWorkerConnection.connect(worker.address))
        aside = StreamedExchange.memory_bytes(share.to_native(), num_lanes, MAX_TOKENS)
        connection.configure(
            share,
            num_blocks,
            ring_bytes=aside + share.ring_bytes(MAX_TOKENS, 16, 1024),
            spin_us=50,
            worker_spin_us=50,
            heartbeat_timeout=DEADLINE,
            transport=transport,  # type: ignore[arg-type]
        )
        return connection

    def lane(self, lane: int, seed: int | None) -> StreamedEngine:
        rng = random.Random(f"{seed} {lane}")

        def dawdle() -> None:
            if seed is not None and rng.random() < 0.2:
                time.sleep(rng.choice([0, 0.0005, 0.003]))

        stream = CpuStream(dawdle)
        self.stack.callback(stream.close)
        return StreamedEngine(self.exchange, self.shares, GEOMETRY, NUM_BLOCKS, stream, seed=lane, lane=lane)


@pytest.fixture
def setup(workers: list[EmbeddedAttentionWorker]) -> Iterator[Setup]:
    with contextlib.ExitStack() as stack:
        yield Setup(stack, workers)


@pytest.mark.parametrize("transport", ["shm", "ucx"])
@pytest.mark.parametrize(
    ("kind", "shares"), [("heads", [4]), ("heads", [1, 3]), ("blocks", [60]), ("blocks", [31, 20, 9])]
)
def test_random_steps(setup: Setup, kind: str, shares: list[int], transport: str) -> None:
    [engine] = setup.open(kind, shares, transport=transport)
    pieces = ranges(shares) if kind == "blocks" else ranges([NUM_BLOCKS])
    workload = Workload(engine, pieces, seed=len(shares))
    for _ in range(30):
        workload.step(padding=16)
    for connection in setup.connections:
        assert connection.stats().tokens_appended > 0
        assert connection.stats().rejected_frames == 0


@pytest.mark.parametrize(("kind", "shares"), [("heads", [4]), ("heads", [1, 3]), ("blocks", [31, 20, 9])])
def test_lanes(setup: Setup, kind: str, shares: list[int]) -> None:
    """Three lanes, each on its thread and its stream, with requests of their own."""
    engines = setup.open(kind, shares, num_lanes=3, seed=1)
    pieces = ranges(shares) if kind == "blocks" else ranges([NUM_BLOCKS])

    def run(engine: StreamedEngine) -> None:
        workload = Workload(engine, [piece[engine.lane :: 3] for piece in pieces], seed=engine.lane)
        for _ in range(20):
            workload.step()

    in_threads([lambda engine=engine: run(engine) for engine in engines])  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "shares"), [("heads", [4]), ("blocks", [40, 20])])
def test_a_step_finds_what_an_earlier_one_stores(
    setup: Setup, kind: str, shares: list[int], seed: int
) -> None:
    """A prompt's block is filled by one lane's step, and hit by a step of the other lane that was announced after it,
    while both are in flight. The later stream is often ahead, and must not be answered sooner."""
    first, second = setup.open(kind, shares, num_lanes=2, seed=seed)
    rng = random.Random(seed)
    free = list(range(NUM_BLOCKS))
    rng.shuffle(free)
    second.k, second.v = first.k, first.v  # one KV cache
    for _ in range(6):
        shared, own = free.pop(), free.pop()
        prompt = Request(0, 32, [shared])
        hit = Request(32, 1, [shared, own])
        first.exchange.announce(0)
        second.exchange.announce(1)
        # Enqueued in either order: what counts is the announcement. The reference needs k and v of the first.
        first.enqueue_step(0, [prompt])
        second.enqueue_step(1, [hit])
        assert second.finish() is None
        assert first.finish() is None


def test_a_stream_waits_for_room(setup: Setup, workers: list[EmbeddedAttentionWorker]) -> None:
    """A prompt without context is answered nothing: the stream is held up by the worker, not by memory."""
    [engine] = setup.open("heads", [4])
    pause(workers[0].pid)
    try:
        engine.exchange.announce(0)
        engine.enqueue_step(0, [Request(0, 150, [1, 2, 3, 4, 5])])
        over = threading.Event()
        engine.stream.enqueue(over.set)
        assert not over.wait(0.3)
    finally:
        os.kill(workers[0].pid, signal.SIGCONT)
    assert engine.finish() is None
    engine.step(1, [Request(150, 1, [1, 2, 3, 4, 5])])


@pytest.mark.parametrize("transport", ["shm", "ucx"])
def test_a_lost_worker_fails_the_steps_of_all_lanes(setup: Setup, transport: str) -> None:
    with contextlib.ExitStack() as stack:
        doomed = EmbeddedAttentionWorker.start(64 << 20, [max(os.sched_getaffinity(0))])
        stack.callback(doomed.stop)
        spare = setup.workers[0]
        setup.workers = [doomed]
        engines = setup.open("heads", [4], num_lanes=2, transport=transport)
        for engine in engines:
            engine.step(0, [Request(0, 20, [engine.lane])])
        pause(doomed.pid)
        for engine in engines:
            engine.exchange.announce(engine.lane)
            engine.enqueue_step(1, [Request(20, 1, [engine.lane])])
        os.kill(doomed.pid, signal.SIGKILL)
        # Neither stream waits for ever, and both lanes are told.
        assert all(engine.finish() for engine in engines)
        assert setup.client.failed_workers == [0]
        # A step that begins now fails at once, and its stream runs through.
        engines[0].exchange.announce(0)
        engines[0].enqueue_step(1, [Request(20, 1, [0])])
        assert engines[0].finish()

        connection = setup.connect(spare, GEOMETRY, NUM_BLOCKS, transport, 2)
        setup.exchange.replace_channel(0, connection.channel)
        setup.client.generation += 1
        for engine in engines:
            engine.step(0, [Request(0, 40, [2 * engine.lane, 2 * engine.lane + 1])])
            engine.step(1, [Request(40, 1, [2 * engine.lane, 2 * engine.lane + 1])])


def test_a_worker_that_is_lost_before_it_is_sent_anything(setup: Setup) -> None:
    """Of a step: the device is busy with something else."""
    doomed = EmbeddedAttentionWorker.start(64 << 20, [max(os.sched_getaffinity(0))])
    setup.stack.callback(doomed.stop)
    setup.workers = [doomed]
    [engine] = setup.open("heads", [4], transport="ucx")
    engine.step(0, [Request(0, 20, [0])])
    engine.step(1, [Request(20, 1, [0])])  # answered: all is taken
    go_on = threading.Event()
    engine.stream.enqueue(lambda: assert_set(go_on))
    engine.exchange.announce(0)
    engine.enqueue_step(1, [Request(21, 1, [0])])
    os.kill(doomed.pid, signal.SIGKILL)
    try:
        assert setup.exchange.finish_step(0) == "the attention worker is gone"
    finally:
        go_on.set()
    engine.stream.synchronize()
    assert setup.client.failed_workers == [0]


@pytest.mark.parametrize(
    ("next_step", "what"),
    [(Request(20, 1, [0]), "output did not come"), (Request(0, 20, [1]), "did not take the oldest layer")],
)
def test_a_worker_that_stands_still(setup: Setup, next_step: Request, what: str) -> None:
    """A prompt is answered nothing, but has more layers than there is room for."""
    worker = EmbeddedAttentionWorker.start(64 << 20, [max(os.sched_getaffinity(0))])
    setup.stack.callback(worker.stop)
    setup.workers = [worker]
    [engine] = setup.open("heads", [4])
    engine.step(0, [Request(0, 19, [0])])
    engine.step(1, [Request(19, 1, [0])])  # answered: all is taken
    pause(worker.pid)
    setup.stack.callback(os.kill, worker.pid, signal.SIGCONT)
    setup.exchange.set_timeout(0.2)
    engine.exchange.announce(0)
    engine.enqueue_step(0, [next_step])
    failure = engine.finish()
    assert failure is not None
    assert f"{what} in time" in failure
    assert setup.client.failed_workers == [0]


def test_only_the_worker_that_is_late_is_lost(setup: Setup) -> None:
    """Not those that have answered the layer: they keep what they hold."""
    late = EmbeddedAttentionWorker.start(64 << 20, [max(os.sched_getaffinity(0))])
    setup.stack.callback(late.stop)
    setup.workers = [setup.workers[0], late, setup.workers[1]]
    [engine] = setup.open("heads", [1, 1, 2])
    engine.step(0, [Request(0, 20, [0])])
    engine.step(1, [Request(20, 1, [0])])  # answered: all is taken
    pause(late.pid)
    setup.stack.callback(os.kill, late.pid, signal.SIGCONT)
    engine.exchange.announce(0)
    engine.enqueue_step(1, [Request(21, 1, [0])])
    wait_until(lambda: all(array_at(engine.words["replies"], (3,), np.dtype(np.uint64))[[0, 2]]))
    setup.exchange.set_timeout(0.0)
    failure = engine.finish()
    assert failure is not None
    assert "output did not come in time" in failure
    assert setup.client.failed_workers == [1]


def test_a_step_that_is_given_up(setup: Setup) -> None:
    """A lane that announced a step and does not begin it, or lets it fail, holds nobody up."""
    first, second = setup.open("heads", [4], num_lanes=2)
    first.exchange.announce(0)
    second.exchange.announce(1)
    second.enqueue_step(0, [Request(0, 20, [1])])
    assert setup.exchange.finish_step(0) is None
    assert second.finish() is None
    first.exchange.announce(0)
    first.enqueue_step(0, [Request(0, 20, [0])])
    setup.exchange.fail_step(0, "for a reason")
    assert first.finish() in ("for a reason", None)  # None: it was over


def test_what_does_not_fit(setup: Setup) -> None:
    [engine] = setup.open("heads", [4])
    engine.exchange.announce(0)
    with pytest.raises(FrameTooLarge, match="frames hold 200"):
        engine.begin_step(0, [Request(0, 250, list(range(8)))])
    with pytest.raises(FrameTooLarge, match="raise ring_bytes"):
        StreamedExchange(setup.client, 1, 1 << 20, spin_us=0)


def assert_set(event: threading.Event) -> None:
    assert event.wait(DEADLINE)


def in_threads(tasks: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    assert not failures
