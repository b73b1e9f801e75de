"""The channel over shared memory: use of its memory, processes, dead peers, bad memory."""

import multiprocessing
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from channel_pairs import DEADLINE, RING_BYTES, Pair, echo_until_closed, ping_pong, shm_pair

from vllm_lamina._native import (
    ChannelClosed,
    ChannelError,
    ShmChannel,
    ShmEnd,
    create_shm_memory,
)

# Where the channel keeps its words, from the start of its memory: see csrc/transport/shm_channel.cpp.
HEADER_BYTES = 64
RING_CONTROL_BYTES = 192 + 64 * 64
CONSUMED, FIRST_SLOT = 0, 192


@pytest.fixture
def pair() -> Iterator[Pair]:
    with shm_pair() as pair:
        yield pair


def start_process(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_few_frames_use_little_memory(pair: Pair, in_flight: int) -> None:
    """However many frames travel, those that do at the same time use the same memory."""
    data, memory = 16384, pair.memory
    assert memory is not None
    for i in range(100):
        pair.client.send(bytes([i]) * 1000, DEADLINE)
        assert bytes([i]) * 1000 in memory[data : data + 1024 * in_flight]
        if i + 1 >= in_flight:
            assert pair.worker.receive(DEADLINE) == bytes([i + 1 - in_flight]) * 1000
    assert not any(memory[data + 1024 * in_flight : data + RING_BYTES])


def _echo(memory_fd: int, there: socket.socket, here: socket.socket, spin_us: int) -> None:
    here.close()
    echo_until_closed(ShmChannel(memory_fd, there.fileno(), ShmEnd.WORKER, spin_us))


@pytest.mark.parametrize("spin_us", [0, 50])
def test_two_processes(spin_us: int) -> None:
    memory_fd = create_shm_memory(32 << 20)
    here, there = socket.socketpair()
    process = start_process(_echo, memory_fd, there, here, spin_us)
    there.close()
    channel = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, spin_us)
    for size in (64, 4096, 1 << 20, 32 << 20):
        ping_pong(channel, size, 5)
    channel.close()
    process.join(DEADLINE)
    assert process.exitcode == 0
    here.close()
    os.close(memory_fd)


@pytest.mark.parametrize("spin_us", [0, 10_000])
def test_killed_peer_ends_a_wait(spin_us: int) -> None:
    memory_fd = create_shm_memory(RING_BYTES)
    here, there = socket.socketpair()
    process = start_process(_echo, memory_fd, there, here, spin_us)
    there.close()
    channel = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, spin_us)
    ping_pong(channel, 64, 10)
    killer = threading.Timer(0.2, process.kill)
    killer.start()
    with pytest.raises(ChannelClosed):
        channel.receive(60.0)
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
