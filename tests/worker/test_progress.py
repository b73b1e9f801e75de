"""The progress counter of the serving loop: a long frame and an idle loop advance it, a stopped one does not."""

import os
import socket
import time
from collections.abc import Iterator

import pytest
from wire_frames import ATTEND, STEP, attend_payload, frame, step_payload
from worker_processes import DEADLINE, wait_until

from vllm_lamina._native import (
    AttentionWorker,
    ChannelClosed,
    ChannelTimeout,
    ShmChannel,
    ShmEnd,
    create_shm_memory,
)
from vllm_lamina.kv_cache.geometry import Geometry

GEOMETRY = Geometry.uniform(1, 32, 8, 1, 64, "float32", (0.125,))
NUM_BLOCKS = 64
WINDOW_SECONDS = 0.1
"""In each of these a loop that is well has advanced."""

LATE_SECONDS = 0.4
"""How much later this process may look, or the serving thread run, where CPUs are shared with other tests."""

LOOKS = 10
"""The machine itself may stand still during one of them, hardly during all."""


@pytest.fixture
def worker() -> AttentionWorker:
    return AttentionWorker(GEOMETRY.to_native(), NUM_BLOCKS, 1, spin_us=0)


@pytest.fixture
def channel(worker: AttentionWorker) -> Iterator[ShmChannel]:
    """Serve the channel whose other end this is."""
    memory_fd = create_shm_memory(32 << 20)
    here, there = socket.socketpair()
    with here, there:
        worker.serve(ShmChannel(memory_fd, there.fileno(), ShmEnd.WORKER, 0))
        channel = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, 0)
        yield channel
        channel.close()
        worker.stop()
    os.close(memory_fd)


def longest_standstill(worker: AttentionWorker, seconds: float) -> float:
    """Return for how long the counter did not move, as far as one can see who looks every 5 ms."""
    longest, since, last = 0.0, time.monotonic(), worker.progress
    end = since + seconds
    while (now := time.monotonic()) < end:
        value = worker.progress
        assert value >= last
        if value != last:
            last, since = value, now
        longest = max(longest, now - since)
        time.sleep(0.005)
    return longest


def send_endless_frame(worker: AttentionWorker, channel: ShmChannel) -> None:
    """Send one that takes many minutes: 2048 query tokens attend 8M tokens."""
    blocks = [i % NUM_BLOCKS for i in range((8 << 20) // GEOMETRY.block_size(0))]
    channel.send(frame(STEP, step_payload(0, [2048], [8 << 20], blocks, [])), 10.0)
    channel.send(frame(ATTEND, attend_payload(GEOMETRY, 2048, 0)), 10.0)
    wait_until(lambda: worker.counters()["messages"] == 2)


def is_still_attending(channel: ShmChannel) -> bool:
    try:
        channel.receive(0.0)
    except ChannelTimeout:
        return True
    return False


def test_not_before_it_serves(worker: AttentionWorker) -> None:
    assert worker.progress == 0


def test_idle(worker: AttentionWorker, channel: ShmChannel) -> None:
    assert any(longest_standstill(worker, 1.0) < WINDOW_SECONDS + LATE_SECONDS for _ in range(LOOKS))
    wait_until(lambda: worker.progress >= 5)


def test_long_prefill(worker: AttentionWorker, channel: ShmChannel) -> None:
    send_endless_frame(worker, channel)
    before = worker.progress
    wait_until(lambda: worker.progress - before > 100)
    assert any(longest_standstill(worker, 0.8) < WINDOW_SECONDS + LATE_SECONDS for _ in range(LOOKS))
    assert is_still_attending(channel), "it was not the idle loop that advanced"


def test_stop_does_not_wait_for_a_long_frame(worker: AttentionWorker, channel: ShmChannel) -> None:
    """An engine cannot keep a worker from the next one by a frame that takes for ever."""
    send_endless_frame(worker, channel)
    time.sleep(0.2)
    begin = time.monotonic()
    worker.stop()
    assert time.monotonic() - begin < DEADLINE
    with pytest.raises(ChannelClosed):
        channel.receive(1.0)


def test_the_longest_request_that_a_frame_can_describe() -> None:
    """Its number of blocks is close to where 32 bits end; it is attended until the worker is stopped."""
    geometry = Geometry.uniform(1, 1 << 14, 1, 1, 32, "float32", (0.125,))
    tokens = 2**31 - 1
    memory_fd = create_shm_memory(4 << 20)
    here, there = socket.socketpair()
    with here, there:
        worker = AttentionWorker(geometry.to_native(), 2, 1, spin_us=0)
        worker.serve(ShmChannel(memory_fd, there.fileno(), ShmEnd.WORKER, 0))
        channel = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, 0)
        blocks = [i % 2 for i in range((tokens >> 14) + 1)]
        channel.send(frame(STEP, step_payload(0, [1], [tokens], blocks, [])), 10.0)
        channel.send(frame(ATTEND, attend_payload(geometry, 1, 0)), 10.0)
        wait_until(lambda: worker.counters()["messages"] == 2)
        before = worker.progress
        wait_until(lambda: worker.progress - before > 100)
        assert is_still_attending(channel)
        worker.stop()
        channel.close()
    os.close(memory_fd)


def test_waiting_for_room_to_answer(worker: AttentionWorker, channel: ShmChannel) -> None:
    """A peer that collects nothing is no fault of the loop."""
    rows = 4096  # an answer of 8 MiB; three fit
    channel.send(frame(STEP, step_payload(rows, [rows], [1], [0], [])), 10.0)
    for _ in range(4):
        channel.send(frame(ATTEND, attend_payload(GEOMETRY, rows, 0)), 60.0)
    while worker.counters()["messages"] < 5:
        time.sleep(0.001)
    assert any(longest_standstill(worker, 1.0) < WINDOW_SECONDS + LATE_SECONDS for _ in range(LOOKS))


def test_stopped(worker: AttentionWorker, channel: ShmChannel) -> None:
    worker.stop()
    stopped = worker.progress
    time.sleep(0.2)
    assert worker.progress == stopped
