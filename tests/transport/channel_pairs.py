"""Both ends of a channel in one process, of either kind."""

import contextlib
import math
import mmap
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_lamina._native import Channel, ChannelClosed, ShmChannel, ShmEnd, UcxChannel, create_shm_memory
from vllm_lamina.transport.ucx import TOKEN_BYTES, load_ucx

RING_BYTES = 64 << 10
DEADLINE = 10.0
LOOPBACK = "127.0.0.1"


@dataclass
class Pair:
    """Both ends, and of a channel over shared memory the memory."""

    client: Channel
    worker: Channel
    memory: mmap.mmap | None = None


def echo_until_closed(channel: Channel) -> None:
    """Send every frame back, until the peer leaves."""
    with contextlib.suppress(ChannelClosed):
        while True:
            channel.send(channel.receive(math.inf), 60.0)


def ping_pong(channel: Channel, size: int, count: int) -> None:
    """Send frames of ``size`` to an echo, one after the other."""
    for number in range(count):
        payload = bytes([number]) * size
        channel.send(payload, 60.0)
        assert channel.receive(60.0) == payload


@contextlib.contextmanager
def shm_pair() -> Iterator[Pair]:
    memory_fd = create_shm_memory(RING_BYTES)
    here, there = socket.socketpair()
    client = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, spin_us=0)
    worker = ShmChannel(memory_fd, there.fileno(), ShmEnd.WORKER, spin_us=0)
    with here, there, mmap.mmap(memory_fd, 0) as memory:
        yield Pair(client, worker, memory)
    os.close(memory_fd)


def ucx_channel(token: bytes, ring_bytes: int = RING_BYTES, spin_us: int = 0) -> UcxChannel:
    """An end on this host's loopback, after `load_ucx`."""
    channel = UcxChannel(token, ring_bytes, spin_us, "lo")
    channel.admit([LOOPBACK])
    return channel


@contextlib.contextmanager
def ucx_pair(ring_bytes: int = RING_BYTES, spin_us: int = 0) -> Iterator[Pair]:
    load_ucx()
    token = secrets.token_bytes(TOKEN_BYTES)
    client, worker = (ucx_channel(token, ring_bytes, spin_us) for _ in range(2))
    client.connect(worker.address)
    worker.connect(client.address)
    client.wait_connected(DEADLINE)
    worker.wait_connected(DEADLINE)
    yield Pair(client, worker)
    client.close()
    worker.close()
