"""Addresses, messages and the connection's errors, against a worker played by the test."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
import zmq

from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, LayerSpec
from vllm_lamina.transport.address import ControlAddress
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import (
    ProtocolMismatch,
    UnsupportedAddress,
    WorkerRefused,
    WorkerUnreachable,
)
from vllm_lamina.transport.listener import MAX_REQUEST_BYTES
from vllm_lamina.wire.messages import (
    MAX_HOSTS,
    PROTOCOL_VERSION,
    Configure,
    Network,
    OpenUcx,
    Refused,
    Welcome,
    decode_request,
    encode,
)

GEOMETRY = Geometry.uniform(2, 32, 4, 2, 64, "float32", (0.125, 0.125))


@pytest.mark.parametrize(
    ("address", "endpoint", "needs_secret"),
    [
        ("127.0.0.1:7100", "tcp://127.0.0.1:7100", False),
        ("tcp://localhost:1", "tcp://127.0.0.1:1", False),
        ("[::1]:7100", "tcp://[::1]:7100", False),
        ("ipc://@vllm-lamina-1", "ipc://@vllm-lamina-1", False),
        ("0.0.0.0:7100", "tcp://0.0.0.0:7100", True),
        ("10.0.0.7:7100", "tcp://10.0.0.7:7100", True),
        ("[::]:7100", "tcp://[::]:7100", True),
        ("[2001:db8::7]:7100", "tcp://[2001:db8::7]:7100", True),
    ],
)
def test_addresses(address: str, endpoint: str, needs_secret: bool) -> None:
    parsed = ControlAddress.parse(address)
    assert (parsed.text, parsed.endpoint, parsed.needs_secret) == (address, endpoint, needs_secret)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("no-such-host.invalid:7100", "the host name has no address"),
        ("127.0.0.1", "write HOST:PORT"),
        ("127.0.0.1:99999", "write HOST:PORT"),
        ("ipc:///tmp/socket", "ipc://@NAME"),
        ("[::1:7100", "write HOST:PORT"),
        ("inproc://name", "write HOST:PORT"),
    ],
)
def test_other_addresses_are_refused(address: str, reason: str) -> None:
    with pytest.raises(UnsupportedAddress, match=reason):
        AttentionWorkerConnection.connect(address, timeout=1.0)


def test_the_largest_models_fit_a_request() -> None:
    cache = CacheSpec(128, 128, 128, 128, "bfloat16")
    slopes = tuple(1 / (head + 3) for head in range(128))
    layers = tuple(LayerSpec(0, 0, position, 128, 0.1, alibi_slopes=slopes) for position in range(126))
    request = Configure(Geometry((cache,), layers), 1, 0)
    assert 64 << 10 < len(encode(request)) < MAX_REQUEST_BYTES
    assert decode_request(encode(request)) == request


def test_scales_match_layers() -> None:
    with pytest.raises(ValueError, match="1 entries for 2 layers"):
        Geometry.uniform(2, 32, 4, 2, 64, "float32", (1.0,))


@pytest.mark.parametrize(
    ("of", "field"),
    [("caches", "num_kv_heads"), ("caches", "head_size"), ("layers", "num_heads"), ("layers", "window")],
)
def test_numbers_are_checked_on_arrival(of: str, field: str) -> None:
    message = msgspec.to_builtins(Configure(GEOMETRY, 4, 0))
    message["geometry"][of][0][field] = -1
    with pytest.raises(msgspec.ValidationError, match=field):
        decode_request(msgspec.msgpack.encode(message))


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        (["memory-1"], "'memory-1' does not appear to be an IPv4 or IPv6 address"),
        (["10.0.0.0/8"], "does not appear to be"),
        (["10.0.0.1"] * (MAX_HOSTS + 1), f"length <= {MAX_HOSTS}"),
    ],
)
def test_hosts_to_admit_are_addresses_and_few(hosts: list[str], reason: str) -> None:
    request = OpenUcx(b"", b"", 1, b"", Network("eth0", ("10.0.0.1", "fd00::1")))
    message = msgspec.msgpack.decode(encode(request))
    assert isinstance(decode_request(msgspec.msgpack.encode(message)), OpenUcx)
    message["network"]["hosts"] = hosts
    with pytest.raises(msgspec.ValidationError, match=reason):
        decode_request(msgspec.msgpack.encode(message))


@contextmanager
def worker_that_answers(answer: Callable[[bytes], bytes]) -> Iterator[str]:
    """A control socket that answers whatever it gets; yields its address."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    control = context.socket(zmq.REP)
    port = control.bind_to_random_port("tcp://127.0.0.1")
    leave = threading.Event()

    def serve() -> None:
        while not leave.is_set():
            if control.poll(50):
                control.send(answer(control.recv()))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        leave.set()
        thread.join(10.0)
        control.close(linger=0)
        context.term()


def test_nobody_there() -> None:
    with pytest.raises(WorkerUnreachable, match="start one with `vllm-lamina worker`"):
        AttentionWorkerConnection.connect("ipc://@vllm-lamina-nobody", timeout=0.2)


def test_another_protocol_version() -> None:
    welcome = {
        **msgspec.to_builtins(Welcome("9.9.9", PROTOCOL_VERSION + 1, 0, 1, [], 1, "name")),
        "later_field": 1,
    }
    with (
        worker_that_answers(lambda _: msgspec.msgpack.encode(welcome)) as address,
        pytest.raises(ProtocolMismatch, match=r"9\.9\.9 .*install the same version on both"),
    ):
        AttentionWorkerConnection.connect(address)


def test_refusal_carries_the_reason() -> None:
    with (
        worker_that_answers(lambda _: encode(Refused("because"))) as address,
        pytest.raises(WorkerRefused, match=f"{address} refused: because"),
    ):
        AttentionWorkerConnection.connect(address)


@pytest.mark.parametrize("answer", [b"", b"\xc1", msgspec.msgpack.encode({"type": "later"})])
def test_answers_that_are_no_messages(answer: bytes) -> None:
    with worker_that_answers(lambda _: answer) as address, pytest.raises(ProtocolMismatch, match="protocol"):
        AttentionWorkerConnection.connect(address)
