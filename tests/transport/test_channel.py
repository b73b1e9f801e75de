"""The channel over shared memory: sizes, wrap and rewind, processes, dead peers, deadlines, bad memory."""

import mmap
import multiprocessing
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from vllm_lamina._native import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    FrameTooLarge,
    ShmChannel,
    ShmEnd,
    create_shm_memory,
)

RING_BYTES = 64 << 10
DEADLINE = 10.0
# Where the channel keeps its words, from the start of its memory: see csrc/transport/shm_channel.cpp.
HEADER_BYTES = 64
RING_CONTROL_BYTES = 192 + 64 * 64
CONSUMED, FIRST_SLOT = 0, 192


@dataclass
class Pair:
    """Both ends of one channel, in this process, and its memory."""

    client: ShmChannel
    worker: ShmChannel
    memory: mmap.mmap


@pytest.fixture
def pair() -> Iterator[Pair]:
    memory_fd = create_shm_memory(RING_BYTES)
    here, there = socket.socketpair()
    client = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, spin_us=0)
    worker = ShmChannel(memory_fd, there.fileno(), ShmEnd.WORKER, spin_us=0)
    with here, there, mmap.mmap(memory_fd, 0) as memory:
        yield Pair(client, worker, memory)
    os.close(memory_fd)


def start_process(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4096, RING_BYTES - 64, RING_BYTES - 1, RING_BYTES])
def test_round_trip(pair: Pair, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    for _ in range(3):
        pair.client.send(payload, DEADLINE)
        assert pair.worker.receive(DEADLINE) == payload
        pair.worker.send(payload[::-1], DEADLINE)
        assert pair.client.receive(DEADLINE) == payload[::-1]


def test_frame_too_large_names_the_limit(pair: Pair) -> None:
    with pytest.raises(
        FrameTooLarge, match=f"{RING_BYTES + 1} bytes .* {RING_BYTES} bytes; raise ring_bytes"
    ):
        pair.client.send(bytes(RING_BYTES + 1), DEADLINE)
    pair.client.send(b"fits", DEADLINE)
    assert pair.worker.receive(DEADLINE) == b"fits"


def test_order_is_kept_when_frames_wrap(pair: Pair) -> None:
    """Frames of all sizes, up to several in flight, so that the ring wraps and rewinds at odd places."""
    rng = random.Random(1)
    waiting: list[bytes] = []
    for _ in range(5000):
        if waiting and (rng.random() < 0.5 or sum(len(frame) + 64 for frame in waiting) > RING_BYTES // 3):
            assert pair.worker.receive(DEADLINE) == waiting.pop(0)
        else:
            waiting.append(rng.randbytes(rng.choice([1, 64, 100, 5000, 20000])))
            pair.client.send(waiting[-1], DEADLINE)
    for frame in waiting:
        assert pair.worker.receive(DEADLINE) == frame


def test_an_empty_ring_starts_over(pair: Pair) -> None:
    """Frames that travel one at a time use the same memory, whatever their number."""
    data = 16384
    for i in range(100):
        pair.client.send(bytes([i]) * 1000, DEADLINE)
        assert pair.memory[data : data + 1000] == bytes([i]) * 1000
        pair.worker.receive(DEADLINE)
    assert not any(pair.memory[data + 1024 : data + RING_BYTES])


def test_sender_waits_for_room(pair: Pair) -> None:
    """More than the ring holds, to a receiver that starts late."""
    frames = [random.Random(i).randbytes(30000) for i in range(20)]

    def send_all() -> None:
        for frame in frames:
            pair.client.send(frame, DEADLINE)

    sender = threading.Thread(target=send_all)
    sender.start()
    time.sleep(0.1)
    assert [pair.worker.receive(DEADLINE) for _ in frames] == frames
    sender.join(DEADLINE)
    assert not sender.is_alive()


def test_deadlines(pair: Pair) -> None:
    begin = time.monotonic()
    with pytest.raises(ChannelTimeout):
        pair.client.receive(0.1)
    pair.client.send(bytes(40000), DEADLINE)
    with pytest.raises(ChannelTimeout):
        pair.client.send(bytes(40000), 0.1)
    assert 0.19 < time.monotonic() - begin < 2.0
    assert pair.worker.receive(DEADLINE) == bytes(40000)


def test_frames_sent_before_closing_are_delivered(pair: Pair) -> None:
    pair.client.send(b"last words", DEADLINE)
    pair.client.close()
    assert pair.worker.receive(DEADLINE) == b"last words"
    with pytest.raises(ChannelClosed):
        pair.worker.receive(DEADLINE)
    assert pair.worker.peer_closed


def _echo(memory_fd: int, there: socket.socket, here: socket.socket, spin_us: int) -> None:
    here.close()
    ShmChannel(memory_fd, there.fileno(), ShmEnd.WORKER, spin_us).echo_until_closed()


@pytest.mark.parametrize("spin_us", [0, 50])
def test_two_processes(spin_us: int) -> None:
    memory_fd = create_shm_memory(32 << 20)
    here, there = socket.socketpair()
    process = start_process(_echo, memory_fd, there, here, spin_us)
    there.close()
    channel = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, spin_us)
    for size in (64, 4096, 1 << 20, 32 << 20):
        assert len(channel.ping_pong(size, 20, 60.0)) == 20
    channel.close()
    process.join(DEADLINE)
    assert process.exitcode == 0
    here.close()
    os.close(memory_fd)


@pytest.mark.parametrize("spin_us", [0, 10_000])
def test_killed_peer_ends_a_wait_soon(spin_us: int) -> None:
    memory_fd = create_shm_memory(RING_BYTES)
    here, there = socket.socketpair()
    process = start_process(_echo, memory_fd, there, here, spin_us)
    there.close()
    channel = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, spin_us)
    channel.ping_pong(64, 10, DEADLINE)
    killed_at = []

    def kill() -> None:
        killed_at.append(time.monotonic())
        os.kill(process.pid or 0, signal.SIGKILL)

    killer = threading.Timer(0.2, kill)
    killer.start()
    with pytest.raises(ChannelClosed):
        channel.receive(DEADLINE)
    # 50 ms by design; the rest is for a busy machine.
    assert time.monotonic() - killed_at[0] < 0.5
    killer.join()
    process.join(DEADLINE)
    here.close()
    os.close(memory_fd)


def test_capacity_costs_no_memory_until_touched() -> None:
    memory_fd = create_shm_memory(1 << 30)
    here, there = socket.socketpair()
    with here, there:
        client = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT)
        worker = ShmChannel(memory_fd, there.fileno(), ShmEnd.WORKER)
        for _ in range(100):
            client.send(bytes(1 << 20), DEADLINE)
            worker.receive(DEADLINE)
        assert os.fstat(memory_fd).st_blocks * 512 < 4 << 20
    os.close(memory_fd)


def test_foreign_memory_is_refused() -> None:
    here, there = socket.socketpair()
    unsealed = os.memfd_create("unsealed")
    os.truncate(unsealed, 1 << 20)
    with here, there:
        with pytest.raises(ChannelError, match="does not hold the memory of a channel"):
            ShmChannel(unsealed, here.fileno(), ShmEnd.WORKER)
        with pytest.raises(ChannelError, match="does not hold the memory of a channel"):
            ShmChannel(here.fileno(), here.fileno(), ShmEnd.WORKER)
    os.close(unsealed)


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, RING_BYTES + 1),
        (RING_BYTES, 1),
        (RING_BYTES - 64, 128),
        (2**64 - 64, 64),
        (1, 64),
        (0, 0),
        (0, 2**64 - 1),
    ],
)
def test_descriptors_are_checked(pair: Pair, offset: int, size: int) -> None:
    """A sender that points outside its ring is not believed; what it sends next is."""
    pair.client.send(b"first", DEADLINE)
    struct.pack_into("<QQ", pair.memory, HEADER_BYTES + FIRST_SLOT + 8, offset, size)
    pair.client.send(b"second", DEADLINE)
    assert pair.worker.receive(DEADLINE) == b"second"
    assert pair.worker.num_bad_descriptors == 1


@pytest.mark.parametrize("consumed", [2, 2**64 - 1])
def test_receiver_that_claims_too_much(pair: Pair, consumed: int) -> None:
    pair.client.send(b"first", DEADLINE)
    struct.pack_into("<Q", pair.memory, HEADER_BYTES + CONSUMED, consumed)
    with pytest.raises(ChannelClosed, match="never sent"):
        pair.client.send(b"second", DEADLINE)
