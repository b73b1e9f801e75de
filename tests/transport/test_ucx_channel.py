"""The channel over UCX: processes, dead peers, strangers, malformed messages, devices, libraries."""

import contextlib
import ctypes.util
import os
import resource
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from channel_pairs import DEADLINE, LOOPBACK, RING_BYTES, ping_pong, ucx_channel, ucx_pair
from lamina_benchmarks import UcxPingPong
from network import listening_ports
from worker_processes import wait_until

from vllm_lamina import _native
from vllm_lamina._native import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    UcxChannel,
    interface_addresses,
)
from vllm_lamina.transport.errors import UcxUnavailable
from vllm_lamina.transport.ucx import (
    DEVICES_VARIABLE,
    LIBRARY_VARIABLE,
    SYSTEM_LIBRARY,
    TOKEN_BYTES,
    describe_ucx,
    load_ucx,
    network_of,
    wheel_library,
)
from vllm_lamina.wire.messages import MAX_HOSTS, Network

HERE = Path(__file__).parent
TOKEN = bytes(range(TOKEN_BYTES))
# The header of a message: see csrc/transport/ucx_channel.cpp.
HELLO, FRAME, GOODBYE = 1, 2, 5
VERSION = 1


def header(kind: int, number: int, size: int, offset: int = 0, piece: int = 0, **other: int | bytes) -> bytes:
    token, consumed = other.get("token", TOKEN), other.get("consumed", 0)
    return struct.pack("<16sII5Q", token, kind, 0, consumed, number, size, offset, piece)


@contextlib.contextmanager
def end_process(
    host: str, peer: str, *arguments: str, prefix: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """One end of a channel in a process of its own: UCX does not survive a fork."""
    command = [*prefix, sys.executable, str(HERE / "ucx_end.py"), host, peer, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the process ended"
    return line.strip()


@contextlib.contextmanager
def channel_to_process(ring_bytes: int, spin_us: int) -> Iterator[tuple[UcxChannel, subprocess.Popen[str]]]:
    load_ucx()
    token = secrets.token_bytes(TOKEN_BYTES)
    channel = ucx_channel(token, ring_bytes, spin_us)
    with end_process(LOOPBACK, LOOPBACK) as process:
        tell(process, token.hex())
        channel.connect(bytes.fromhex(hear(process)))
        tell(process, channel.address.hex())
        channel.wait_connected(DEADLINE)
        yield channel, process


@pytest.mark.parametrize("spin_us", [0, 50])
def test_two_processes(spin_us: int) -> None:
    with channel_to_process(64 << 20, spin_us) as (channel, process):
        for size in (64, 4096, 61440, 61441, 1 << 20, 64 << 20):
            ping_pong(channel, size, 3)
        assert channel.transports == ["tcp/lo"]
        assert not channel.has_rdma
        channel.close()
        assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize("spin_us", [0, 10_000])
@pytest.mark.parametrize("frame_bytes", [0, 40 << 20])
def test_killed_peer_ends_a_wait(spin_us: int, frame_bytes: int) -> None:
    """While nothing travels, and while the peer's ring fills."""
    with channel_to_process(64 << 20, spin_us) as (channel, process):
        ping_pong(channel, 64, 10)

        def keep_busy() -> None:
            while frame_bytes:
                channel.send(bytes(frame_bytes), 60.0)
            channel.receive(60.0)

        killer = threading.Timer(0.2, process.kill)
        killer.start()
        with pytest.raises(ChannelClosed):
            keep_busy()
        killer.join()
        assert channel.peer_closed


def test_large_frames_posted_before_closing_are_delivered() -> None:
    payload = os.urandom(3 << 20)
    with ucx_pair(16 << 20) as pair:
        for _ in range(4):
            pair.client.send(payload, DEADLINE)
        closer = threading.Thread(target=pair.client.close)
        closer.start()
        for _ in range(4):
            assert pair.worker.receive(DEADLINE) == payload
        with pytest.raises(ChannelClosed, match="the peer closed"):
            pair.worker.receive(DEADLINE)
        with pytest.raises(ChannelClosed):
            pair.worker.send(b"too late", DEADLINE)
        closer.join(DEADLINE)


def test_frames_move_while_nobody_waits() -> None:
    """More than sockets hold leaves and arrives while both ends do something else."""
    payload = os.urandom(30 << 20)
    with ucx_pair(32 << 20) as pair:

        def receive_without_waiting() -> bytes:
            # Few looks, for a busy machine: each of them moves a part of what has arrived.
            for _ in range(5):
                time.sleep(0.5)
                with contextlib.suppress(ChannelTimeout):
                    return pair.worker.receive(0.0)
            pytest.fail("nothing came")

        pair.client.send(payload, DEADLINE)
        pair.client.send(b"next", DEADLINE)
        assert receive_without_waiting() == payload
        assert receive_without_waiting() == b"next"


def test_frames_sent_before_the_peer_connects_arrive() -> None:
    load_ucx()
    client, worker = (ucx_channel(TOKEN) for _ in range(2))
    with pytest.raises(ChannelTimeout):
        client.send(b"not connected", 0.05)
    client.connect(worker.address)
    with pytest.raises(ChannelTimeout):
        client.wait_connected(0.05)
    worker.connect(client.address)
    client.send(b"first", DEADLINE)
    assert worker.receive(DEADLINE) == b"first"


def test_capacity_costs_no_memory_until_touched() -> None:
    with ucx_pair(1 << 30) as pair:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(100):
            pair.client.send(bytes(1 << 20), DEADLINE)
            pair.worker.receive(DEADLINE)
            pair.worker.send(b"credit", DEADLINE)
            pair.client.receive(DEADLINE)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_another_token_is_refused() -> None:
    load_ucx()
    client, stranger = (ucx_channel(token) for token in (TOKEN, TOKEN[::-1]))
    client.connect(stranger.address)
    stranger.connect(client.address)
    for end in (client, stranger):
        with pytest.raises(ChannelTimeout):
            end.wait_connected(0.2)
        wait_until(lambda end=end: end.num_bad_descriptors)
        assert end.num_bad_descriptors == 1


def test_token_and_capacity_are_checked() -> None:
    load_ucx()
    with pytest.raises(ChannelError, match="16 bytes"):
        UcxChannel(b"short", RING_BYTES)
    client, worker = (ucx_channel(TOKEN, ring) for ring in (RING_BYTES, 2 * RING_BYTES))
    client.connect(worker.address)
    worker.connect(client.address)
    for end in (client, worker):
        with pytest.raises(ChannelClosed, match="another ring_bytes"):
            end.receive(DEADLINE)


@pytest.fixture
def attacked() -> tuple[UcxChannel, Callable[[bytes, bytes], None]]:
    """A channel, and what sends any message to it."""
    library = load_ucx()
    channel = ucx_channel(TOKEN)
    peer = UcxPingPong(library.path, 1 << 20, "lo")
    peer.admit([LOOPBACK])
    peer.connect(channel.address)
    channel.connect(peer.address)

    def send(header: bytes, payload: bytes) -> None:
        peer.send(header, payload, DEADLINE)

    send(header(HELLO, VERSION, RING_BYTES), b"")
    channel.wait_connected(DEADLINE)
    return channel, send


@pytest.mark.parametrize(
    ("size", "offset", "piece", "payload"),
    [
        (64, RING_BYTES, 0, 64),
        (128, RING_BYTES - 64, 0, 128),
        (64, 2**64 - 64, 0, 64),
        (64, 1, 0, 64),
        (0, 0, 0, 0),
        (0, 0, 0, 64),
        (64, 0, 0, 0),
        (RING_BYTES + 1, 0, 0, 64),
        (2**64 - 1, 0, 0, 64),
        (64, 0, 0, 128),
        (64, 0, 1, 64),
        (64, 0, 2**64 - 64, 64),
        # By rendezvous.
        (64, 0, 0, 1 << 20),
    ],
)
def test_frames_are_checked(
    attacked: tuple[UcxChannel, Callable[[bytes, bytes], None]],
    size: int,
    offset: int,
    piece: int,
    payload: int,
) -> None:
    """A frame that does not fit its description is skipped; what follows is received."""
    channel, send = attacked
    if payload == 1 << 20:
        # UCX lets a rendezvous that the receiver declines end when it likes.
        with contextlib.suppress(ChannelTimeout):
            send(header(FRAME, 0, size, offset, piece), bytes(payload))
    else:
        send(header(FRAME, 0, size, offset, piece), bytes(payload))
    send(header(FRAME, 1, 6), b"second")
    assert channel.receive(DEADLINE) == b"second"
    assert channel.num_bad_descriptors == 1


def test_messages_out_of_place_are_dropped(
    attacked: tuple[UcxChannel, Callable[[bytes, bytes], None]],
) -> None:
    channel, send = attacked
    bad = [
        (b"", b"no header"),
        (header(FRAME, 0, 4, token=TOKEN[::-1]), b"fake"),
        (header(GOODBYE, 0, 0, token=TOKEN[::-1]), b""),
        (header(99, 0, 0), b""),
        (header(FRAME, 64, 4), b"far ahead"),
        (header(FRAME, 0, 4, consumed=1), b"never sent"),
    ]
    for head, payload in bad:
        send(head, payload)
    send(header(FRAME, 0, 10), b"first")
    send(header(FRAME, 0, 10, piece=5), b"frame")
    # Again, when it is complete; and when it is released.
    send(header(FRAME, 0, 10), b"other")
    assert channel.receive(DEADLINE) == b"firstframe"
    send(header(FRAME, 0, 10), b"other")
    send(header(FRAME, 1, 6), b"second")
    assert channel.receive(DEADLINE) == b"second"
    assert channel.num_bad_descriptors == len(bad) + 2
    assert not channel.peer_closed


def answers(port: int, source: str, host: str = LOOPBACK) -> bool:
    """Whether a connection from one loopback address to another comes about."""
    try:
        socket.create_connection((host, port), 0.5, (source, 0)).close()
    except TimeoutError:
        return False
    return True


def test_ports_of_ucx_are_closed_to_strangers() -> None:
    """UCX itself writes to whatever memory a peer names that connects to them."""
    load_ucx()
    before = listening_ports(os.getpid())
    channel = UcxChannel(TOKEN, RING_BYTES, 0, "lo")
    [port] = listening_ports(os.getpid()) - before
    assert not answers(port, LOOPBACK), "nobody is admitted yet"
    channel.admit(["127.0.0.9", "::1", "fe80::1%lo", "10.0.0.1", "127.0.0.2"])
    assert answers(port, "127.0.0.2")
    assert answers(port, "127.0.0.9")
    assert not answers(port, "127.0.0.3")
    assert not answers(port, LOOPBACK)
    channel.admit([])
    assert not answers(port, "127.0.0.2")
    with pytest.raises(ChannelError, match="'localhost' is no numeric IP address"):
        channel.admit(["localhost"])
    with socket.create_server((LOOPBACK, 0)) as other:
        assert answers(other.getsockname()[1], LOOPBACK), "sockets of others are left alone"


def test_ports_of_ucx_are_closed_to_strangers_over_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    load_ucx()
    loopback = "::1"
    if loopback not in dict(map(reversed, interface_addresses())):
        pytest.skip("this host has no IPv6")
    monkeypatch.setenv("UCX_TCP_AF_PRIO", "inet6")
    before = listening_ports(os.getpid())
    channel = UcxChannel(TOKEN, RING_BYTES, 0, "lo")
    [port] = listening_ports(os.getpid()) - before
    # Each differs in one of the four words that are compared.
    channel.admit(["1::1", "0:0:1::1", "::1:0:1", "::2", LOOPBACK])
    assert not answers(port, loopback, loopback)
    channel.admit([LOOPBACK, "::2", loopback])
    assert answers(port, loopback, loopback)


ADDRESSES = [
    ("lo", "127.0.0.1"),
    ("eth0", "10.0.0.1"),
    ("eth0", "10.0.0.2"),
    ("eth1", "10.1.0.1"),
    ("lo", "::1"),
    ("eth0", "fd00::1"),
    ("eth0", "fd00::2"),
    ("eth0", "fe80::1%eth0"),
]


@pytest.mark.parametrize(
    ("host", "chosen", "network"),
    [
        ("127.0.0.2", "", Network("lo", ("127.0.0.1", "::1", "127.0.0.2"))),
        ("10.0.0.2", "", Network("eth0", ("10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2"))),
        ("fd00::2", "", Network("eth0", ("fd00::1", "10.0.0.1", "fd00::2", "10.0.0.2"))),
        ("10.1.0.1", "", Network("eth1", ("10.1.0.1",))),
        ("10.9.9.9", "lo,eth1", Network("lo,eth1", ("127.0.0.1", "10.1.0.1", "::1", "10.9.9.9"))),
        (
            "10.1.0.1",
            "mlx5_0:1",
            Network(
                "mlx5_0:1",
                ("127.0.0.1", "10.0.0.1", "10.1.0.1", "::1", "fd00::1", "10.0.0.2", "fd00::2"),
            ),
        ),
    ],
)
def test_network_of_an_address(
    monkeypatch: pytest.MonkeyPatch, host: str, chosen: str, network: Network
) -> None:
    """What UCX takes of an interface comes first: one address of each family, that of the control connection."""
    monkeypatch.setenv(DEVICES_VARIABLE, chosen)
    monkeypatch.setattr(_native, "interface_addresses", lambda: ADDRESSES)
    assert network_of(host) == network


def test_a_network_of_many_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [("eth0", f"10.0.0.{number}") for number in range(1, 60)] + [("eth0", "fd00::1")]
    monkeypatch.setattr(_native, "interface_addresses", lambda: many)
    hosts = network_of("10.0.0.50").hosts
    assert len(hosts) == MAX_HOSTS
    assert hosts[:3] == ("10.0.0.1", "fd00::1", "10.0.0.2")
    assert hosts[-1] == "10.0.0.50"


def test_devices_that_are_not_there() -> None:
    with pytest.raises(UcxUnavailable, match=r"192\.0\.2\.1 on the host .* name another address"):
        network_of("192.0.2.1")
    load_ucx()
    with pytest.raises(ChannelError, match="no transport over the network device no-such-device"):
        UcxChannel(TOKEN, RING_BYTES, 0, "no-such-device")


def test_unusable_libraries_are_named() -> None:
    with pytest.raises(UcxUnavailable, match=r"/no/libucp.*pip install 'vllm-lamina\[ucx\]'"):
        load_ucx("/no/libucp.so.0")
    with pytest.raises(UcxUnavailable, match=r"libm.so.6 is not libucp"):
        load_ucx("libm.so.6")


def test_description() -> None:
    info = load_ucx()
    assert describe_ucx(info) == f"UCX {info.version} ({info.path}), RDMA " + (
        "available" if info.has_rdma else "not available"
    )
    with ucx_pair() as pair:
        assert isinstance(pair.client, UcxChannel)
        assert ", channel over tcp/lo, RDMA " in describe_ucx(info, pair.client)


@pytest.mark.skipif(LIBRARY_VARIABLE in os.environ, reason=f"{LIBRARY_VARIABLE} chooses the library")
@pytest.mark.parametrize("kind", ["system", "wheel"])
def test_each_library(kind: str) -> None:
    """The tests of both modules again with each UCX that is installed, since a process loads one."""
    library = ctypes.util.find_library("ucp") if kind == "system" else wheel_library()
    if library is None:
        needed = "libucx0" if kind == "system" else "libucx-cu12, from the extra ucx,"
        pytest.skip(f"the {kind}'s UCX is not here: {needed} is not installed")
    if (SYSTEM_LIBRARY if ctypes.util.find_library("ucp") else wheel_library()) == library:
        return  # It is the one that all of the other tests use.
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not shm", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "test_channel.py"), __file__],
        env={**os.environ, LIBRARY_VARIABLE: library},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with two links between them, 10.201.1.0/24 and 10.201.2.0/24, hosts 1 and 2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip tool")
    names = tuple(f"lamina-{os.getpid()}-{end}" for end in (1, 2))
    try:
        try:
            for name in names:
                run("ip", "netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr.decode().strip()}")
        for link in (1, 2):
            peer = ["peer", "name", f"veth{link}", "netns", names[1]]
            run("ip", "-n", names[0], "link", "add", f"veth{link}", "type", "veth", *peer)
            for end, name in enumerate(names, start=1):
                run("ip", "-n", name, "address", "add", f"10.201.{link}.{end}/24", "dev", f"veth{link}")
                run("ip", "-n", name, "link", "set", f"veth{link}", "up")
        deadline = time.monotonic() + DEADLINE
        for name in names:
            # The links carry nothing, and UCX passes them over, until the kernel says so.
            while (
                subprocess.run(
                    ["ip", "-n", name, "link", "show", "up"], capture_output=True, text=True, timeout=DEADLINE
                ).stdout.count("state UP")
                < 2
            ):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=DEADLINE)


@pytest.mark.parametrize("link", [1, 2])
def test_between_hosts_over_the_link_of_the_address(namespaces: tuple[str, str], link: int) -> None:
    token = secrets.token_bytes(TOKEN_BYTES)
    hosts = [f"10.201.{link}.{end}" for end in (1, 2)]
    prefixes = [["ip", "netns", "exec", name] for name in namespaces]
    with (
        end_process(hosts[0], hosts[1], "ping-pong", prefix=prefixes[0]) as client,
        end_process(hosts[1], hosts[0], prefix=prefixes[1]) as worker,
    ):
        for process in (client, worker):
            tell(process, token.hex())
        addresses = hear(client), hear(worker)
        tell(client, addresses[1])
        tell(worker, addresses[0])
        for process in (client, worker):
            assert hear(process) == f"tcp/veth{link}"
        assert client.wait(30.0) == 0
        assert worker.wait(DEADLINE) == 0
