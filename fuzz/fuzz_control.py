"""Fuzzes the control port of a real attention worker: requests that are nearly right, and messages that are none.

    python fuzz/fuzz_control.py --requests 100000 [--seed 1]

Two phases. First an engine is connected and strangers send what they like, without its token: every message must be
answered with a reply of the protocol, and the engine must keep its pool and its right answers. Then there is no engine,
and the messages may configure pools, open channels and leave. In both, the worker must live, answer, and not grow.
"""

import argparse
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from vllm_lamina._native import AttentionClient, Partition
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.listener import MAX_REQUEST_BYTES
from vllm_lamina.wire.messages import (
    BlockBytesRequest,
    Configure,
    Configured,
    Heartbeat,
    Hello,
    Leave,
    Network,
    OpenUcx,
    Refused,
    StatsRequest,
    TraceRequest,
    decode_reply,
    encode,
)

GEOMETRY = Geometry.uniform(1, 32, 4, 2, 32, "float32", (0.125,))
NUM_BLOCKS = 4
DEADLINE_MS = 20_000
MAX_GROWTH_BYTES = 128 << 20
NUMBERS = [
    0,
    1,
    -1,
    31,
    32,
    33,
    255,
    2**14,
    2**15,
    2**31 - 32,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**63 - 1,
    2**63,
]
NUMBERS += [2**64 - 1, -(2**31), -(2**63)]
TEXTS = [
    "",
    "x",
    "\0",
    "a" * 300,
    "a" * 50_000,
    "\u00e9\U0001f600",
    "float32",
    "bfloat16",
    "ucx",
    "127.0.0.1",
    "start",
]


def valid_requests(token: bytes) -> list[Any]:
    """One of each kind, and some whose values are worth a try."""
    return [
        Hello("0.1.0", 2),
        BlockBytesRequest(GEOMETRY),
        BlockBytesRequest(Geometry.uniform(2, 128, 32, 8, 128, "bfloat16", (0.1, 0.1))),
        Configure(GEOMETRY, NUM_BLOCKS, 0, engine="fuzz"),
        Configure(GEOMETRY, 2**31 - 1, 0),
        Configure(GEOMETRY, NUM_BLOCKS, 0, transport="ucx", host="127.0.0.1"),
        OpenUcx(token, bytes(16), 1 << 16, bytes(100), Network("lo", ("127.0.0.1", "::1"))),
        Heartbeat(token),
        Leave(token),
        StatsRequest(),
        TraceRequest("start"),
        TraceRequest("take"),
    ]


class Mutator:
    """Changes requests: their values by what goes wrong elsewhere, or the bytes that they are sent as."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def message(self, token: bytes) -> bytes:
        """Return one message."""
        rng = self.random
        request = rng.choice(valid_requests(token))
        kind = rng.random()
        if kind < 0.15:
            return encode(request)
        if kind < 0.75:
            return self.packed(self.changed(msgspec.msgpack.decode(encode(request))))
        data = bytearray(encode(request))
        for _ in range(rng.choice([1, 1, 2, 4, 16])):
            position = rng.randrange(len(data))
            match rng.randrange(5):
                case 0:
                    data[position] ^= 1 << rng.randrange(8)
                case 1:
                    data[position] = rng.choice(
                        [0xC1, 0xC6, 0xC9, 0xDB, 0xDD, 0xDF, 0x91, 0xFF, rng.randrange(256)]
                    )
                case 2:
                    del data[position:]
                    data += b"\x90"
                case 3:
                    data[position:position] = rng.choice([b"\x91", b"\x81\xa1x"]) * rng.choice(
                        [1, 100, 20_000]
                    )
                case 4:
                    data[position:position] = rng.randbytes(rng.choice([1, 8, 1000]))
        return bytes(data)[: MAX_REQUEST_BYTES - 1]

    def value(self, depth: int = 0) -> Any:
        """Return any value."""
        rng = self.random
        match rng.randrange(9 if depth < 3 else 6):
            case 0 | 1:
                return rng.choice(NUMBERS)
            case 2:
                return rng.choice(TEXTS)
            case 3:
                return rng.choice([0.0, -1.5, float("inf"), float("nan"), 1e308, 1e-45])
            case 4:
                return rng.choice([None, True, False])
            case 5:
                return rng.choice([b"", bytes(16), bytes(32), b"\xff" * 33, bytes(20_000)])
            case 6:
                return [self.value(depth + 1) for _ in range(rng.choice([0, 1, 3, 50]))]
            case 7:
                return {rng.choice(TEXTS[:4]): self.value(depth + 1)}
            case _:
                return [0.125] * rng.choice([0, 1, 2, 5000])

    def changed(self, value: Any) -> Any:
        """Return a message with some of its fields changed, left out or added."""
        rng = self.random
        if not isinstance(value, dict) or not value:
            return self.value()
        result = dict(value)
        for _ in range(rng.choice([1, 1, 2, 3])):
            name = rng.choice(list(value))
            match rng.randrange(8):
                case 0:
                    result.pop(name, None)
                case 1:
                    result[rng.choice(TEXTS[:4])] = self.value()
                case 2 | 3 if isinstance(value[name], dict):
                    result[name] = self.changed(value[name])
                case 4 if isinstance(value[name], int):
                    result[name] = value[name] + rng.choice([-1, 1, 32, -32])
                case _:
                    result[name] = self.value()
        return result

    def packed(self, value: Any) -> bytes:
        """Encode; sometimes with text that is none."""
        data = msgspec.msgpack.encode(value)
        if self.random.random() < 0.1:
            data = data.replace(b"a" * 4, b"\xff\xfe\xed\xa0").replace(b"127.", b"\xff\xff\xff\xff")
        return data[: MAX_REQUEST_BYTES - 1]


class Client:
    """A stranger's connection."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(f"tcp://{address}")

    def ask(self, payload: bytes) -> Any:
        """Send a message and return its reply, which there must be."""
        self.socket.send_multipart([b"", payload])
        if not self.socket.poll(DEADLINE_MS):
            raise AssertionError(f"no reply within {DEADLINE_MS} ms to {payload[:200]!r}")
        return decode_reply(self.socket.recv_multipart()[-1])

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
        self._context.term()


@contextlib.contextmanager
def worker(log: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A worker on loopback, without a secret; entered once it listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "vllm_lamina.cli", "worker", "--listen", address, "--memory", "64MiB"]
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            end = time.monotonic() + 30.0
            while "listening on" not in log.read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise AssertionError(f"the worker did not start: {log.read_text()}")
                time.sleep(0.02)
            yield address, process
        finally:
            process.terminate()
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()


def resident_bytes(pid: int) -> int:
    """Return what a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Engine:
    """An engine that decodes: each token has the same v, so that is what attention must return."""

    def __init__(self, address: str) -> None:
        self.connection = AttentionWorkerConnection.connect(address)
        self.connection.configure(GEOMETRY, NUM_BLOCKS)
        partition = Partition.by_heads(GEOMETRY.to_native(), [[GEOMETRY.caches[0].num_kv_heads]])
        self.client = AttentionClient([self.connection.channel], partition)
        self.context = 0

    def step(self) -> None:
        """Decode one token."""
        context, query = np.array([self.context], np.int32), np.ones(1, np.int32)
        table = np.arange(NUM_BLOCKS, dtype=np.int32)[None]
        self.client.begin_step(0, 1, query, context, [(table, np.array([self.context], np.int64))])
        q = np.ones((1, GEOMETRY.layers[0].num_heads * GEOMETRY.caches[0].head_size), np.float32)
        kv = np.full((1, GEOMETRY.caches[0].num_kv_heads * GEOMETRY.caches[0].head_size), 0.75, np.float32)
        out = np.zeros_like(q)
        rows = [(array.ctypes.data, array.strides[0]) for array in (q, kv, kv, out)]
        self.client.attend(0, 0, *rows[0], *rows[1], *rows[2], *rows[3], timeout=20.0)
        assert np.allclose(out, 0.75, atol=1e-5), "attention is wrong"
        self.context = (self.context + 1) % (NUM_BLOCKS * GEOMETRY.block_size(0))


def fuzz(
    address: str, process: "subprocess.Popen[bytes]", log: Path, num_requests: int, seed: int
) -> Counter[str]:
    """Send the messages of both phases; returns how often each kind of reply came.

    Raises
    ------
    AssertionError
        The worker ended, did not answer, grew, or harmed its engine.
    """
    mutator, replies, before = Mutator(seed), Counter[str](), 0
    stranger, token = Client(address), bytes(32)
    engine: Engine | None = Engine(address)
    for number in range(num_requests):
        if number == num_requests // 2 and engine is not None:
            assert engine.connection.alive, engine.connection.lost_reason
            engine.connection.close()
            engine = None
        message = mutator.message(token)
        try:
            reply = stranger.ask(message)
        except AssertionError as error:
            raise AssertionError(
                f"{error}; worker's status {process.poll()}: {log.read_text()[-3000:]}"
            ) from error
        replies[type(reply).__name__] += 1
        if isinstance(reply, Refused) and "is not one of protocol" in reply.reason:
            replies["Refused as no message"] += 1
        if engine is not None:
            assert not isinstance(reply, Configured), "a second engine was admitted"
            if number % 16 == 0:
                engine.step()
        elif isinstance(reply, Configured):
            token = reply.token
        elif mutator.random.random() < 0.02:
            stranger.ask(encode(Leave(token)))
        if number % 64 == 0:
            stranger.close()
            stranger = Client(address)
        if number == num_requests // 10:
            before = resident_bytes(process.pid)
    stranger.ask(encode(Leave(token)))
    stranger.close()
    growth = resident_bytes(process.pid) - before
    assert growth < MAX_GROWTH_BYTES, f"the worker grew by {growth} bytes"
    last = Engine(address)
    last.step()
    last.connection.close()
    assert process.poll() is None
    return replies


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with worker(log) as (address, process):
            replies = fuzz(address, process, log, options.requests, options.seed)
    counts = ", ".join(f"{count} {name}" for name, count in replies.most_common())
    print(f"fuzz: {options.requests} control messages, each answered: {counts}; crashes=0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
