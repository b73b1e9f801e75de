"""What a worker does where descriptors or memory are short, and when peers try to make them so."""

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from engine import Engine, Request
from wire_frames import STEP, frame, raw_channel
from worker_processes import CLI, DEADLINE, Worker, free_port, wait_until, worker_process

from vllm_lamina.host import POOL_RESERVE_BYTES
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import WorkerRefused
from vllm_lamina.units import format_bytes
from vllm_lamina.wire.messages import (
    Configure,
    Configured,
    Goodbye,
    Heartbeat,
    Leave,
    Network,
    OpenUcx,
    Refused,
    StatsRequest,
    WorkerStats,
    decode_reply,
    encode,
)

GEOMETRY = Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125))
NUM_BLOCKS = 8
NETWORK = Network("lo", ("127.0.0.1",))


@pytest.fixture
def local_worker(tmp_path: Path) -> Iterator[Worker]:
    """On loopback, without a secret: every process of this host may ask."""
    with worker_process(tmp_path / "log", f"127.0.0.1:{free_port()}") as worker:
        yield worker


def check_served(connection: AttentionWorkerConnection) -> None:
    Engine.on(connection, GEOMETRY, NUM_BLOCKS).step(0, [Request(0, 40, [1, 2])])


def resident_bytes(worker: Worker) -> int:
    statm = Path(f"/proc/{worker.process.pid}/statm").read_text()
    return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def stranger_of(worker: Worker) -> Iterator["zmq.Socket[bytes]"]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(f"tcp://{worker.address}")
        yield stranger


def ask(stranger: "zmq.Socket[bytes]", request: object) -> object:
    stranger.send_multipart([b"", encode(request)])
    assert stranger.poll(int(DEADLINE * 1000))
    return decode_reply(stranger.recv_multipart()[-1])


# Peers without the token.


def test_what_others_on_this_host_can_do(local_worker: Worker) -> None:
    """Ask, and no more: the engine that is served notices nothing."""
    with (
        AttentionWorkerConnection.connect(local_worker.address) as engine,
        stranger_of(local_worker) as stranger,
    ):
        engine.configure(GEOMETRY, NUM_BLOCKS)
        for token in (b"", bytes(32), b"x" * 32, bytes(50_000)):
            assert isinstance(ask(stranger, Heartbeat(token)), Refused)
            assert isinstance(ask(stranger, Leave(token)), Goodbye)
            assert isinstance(ask(stranger, OpenUcx(token, bytes(16), 1 << 16, b"", NETWORK)), Refused)
        refused = ask(stranger, Configure(GEOMETRY, NUM_BLOCKS, 0))
        assert isinstance(refused, Refused)
        assert "serves another engine" in refused.reason
        assert engine.alive
        check_served(engine)


def test_silent_connections_to_the_data_socket(local_worker: Worker) -> None:
    """They do not keep an engine from its channel."""
    with AttentionWorkerConnection.connect(local_worker.address) as engine, contextlib.ExitStack() as held:
        name = engine.welcome.data_socket
        for _ in range(40):
            silent = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            silent.settimeout(DEADLINE)
            silent.connect("\0" + name)
        engine.configure(GEOMETRY, NUM_BLOCKS)
        check_served(engine)


def test_wrong_tokens_on_the_data_socket(local_worker: Worker) -> None:
    with AttentionWorkerConnection.connect(local_worker.address) as engine:
        engine.configure(GEOMETRY, NUM_BLOCKS)
        for _ in range(200):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                stranger.settimeout(DEADLINE)
                stranger.connect("\0" + engine.welcome.data_socket)
                stranger.send(b"guess" * 10)
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
        check_served(engine)


def test_replies_that_nobody_reads_take_no_memory(local_worker: Worker) -> None:
    with (
        AttentionWorkerConnection.connect(local_worker.address) as engine,
        stranger_of(local_worker) as stranger,
    ):
        engine.configure(GEOMETRY, NUM_BLOCKS)
        before = resident_bytes(local_worker)
        with zmq.Context() as context, context.socket(zmq.DEALER) as slow:
            slow.linger, slow.rcvhwm, slow.sndtimeo = 0, 1, 50
            slow.connect(f"tcp://{local_worker.address}")
            for _ in range(100_000):
                with contextlib.suppress(zmq.Again):
                    slow.send_multipart([b"", encode(StatsRequest())])
            assert isinstance(ask(stranger, StatsRequest()), WorkerStats)
            assert resident_bytes(local_worker) - before < 32 << 20
        check_served(engine)


def test_message_that_claims_to_be_giant(local_worker: Worker) -> None:
    """ZMTP 3 by hand: after the handshake, a frame of 2**60 bytes. The connection ends, and nothing is reserved."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
    host, port = local_worker.address.split(":")
    before = resident_bytes(local_worker)
    with socket.create_connection((host, int(port)), timeout=DEADLINE) as stranger:
        stranger.sendall(greeting)
        stranger.sendall(b"\x04" + bytes([len(ready)]) + ready)
        stranger.sendall(b"\x02" + (2**60).to_bytes(8, "big") + bytes(4096))
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
    assert resident_bytes(local_worker) - before < 8 << 20
    with AttentionWorkerConnection.connect(local_worker.address) as engine:
        engine.configure(GEOMETRY, NUM_BLOCKS)
        check_served(engine)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"block_size": 2**31 - 32}, "block_size = 2147483616 is more than 16384"),
        ({"num_heads": 2**30, "num_kv_heads": 2**30}, "num_heads = 1073741824 is more than 16384"),
        # Their product wraps around to 0 in 64 bits.
        (
            {"block_size": 2**30, "num_heads": 2**23, "num_kv_heads": 2**23, "head_size": 256},
            "is more than 16384",
        ),
    ],
)
def test_sizes_that_overflow(local_worker: Worker, values: dict[str, int], reason: str) -> None:
    shape = {"num_layers": 1, "block_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_size": 32, **values}
    geometry = Geometry.uniform(dtype="float32", scales=(0.125,), **shape)
    with AttentionWorkerConnection.connect(local_worker.address) as engine:
        for request in (engine.block_bytes, lambda geometry: engine.configure(geometry, 1)):
            with pytest.raises(WorkerRefused, match=reason):
                request(geometry)
        with pytest.raises(WorkerRefused, match="more than the worker's 64 MiB"):
            engine.configure(GEOMETRY, 2**31 - 1)


@pytest.mark.parametrize("address", [b"", b"\x00", b"\xff" * 33, bytes(100)])
def test_malformed_ucx_addresses(local_worker: Worker, address: bytes) -> None:
    with (
        AttentionWorkerConnection.connect(local_worker.address) as engine,
        stranger_of(local_worker) as stranger,
    ):
        request = Configure(GEOMETRY, NUM_BLOCKS, 0, transport="ucx", host="127.0.0.1")
        configured = engine._control.request(request, Configured)
        refused = ask(stranger, OpenUcx(configured.token, bytes(16), 1 << 16, address, NETWORK))
        assert isinstance(refused, Refused)
        assert "UCX" in refused.reason
        assert isinstance(ask(stranger, Leave(configured.token)), Goodbye)
        engine.configure(GEOMETRY, NUM_BLOCKS)
        check_served(engine)


# Descriptors.


def limited(descriptors: int) -> tuple[str, ...]:
    """A prefix of a command that gets so few, as its hard limit."""
    program = (
        "import os, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return (sys.executable, "-c", program)


def test_too_few_descriptors_to_start() -> None:
    ended = subprocess.run(
        [*limited(64), *CLI, "worker", "--memory", "64MiB", "--listen", f"127.0.0.1:{free_port()}"],
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert (
        "this process may open 64 files, and a worker needs 128: raise the hard limit (ulimit -Hn"
        in ended.stderr
    )


@contextlib.contextmanager
def silent_clients(worker: Worker, number: int) -> Iterator[None]:
    """They connect to the control port, or try to, and say nothing."""
    host, port = worker.address.split(":")
    with contextlib.ExitStack() as held:
        for _ in range(number):
            stranger = held.enter_context(socket.socket())
            stranger.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                stranger.connect((host, int(port)))
        yield


def num_descriptors(worker: Worker) -> int:
    return len(list(Path(f"/proc/{worker.process.pid}/fd").iterdir()))


def test_more_strangers_than_descriptors(tmp_path: Path) -> None:
    """Who was admitted before still gets its data channel; when they are gone, everybody is served again."""
    address = f"127.0.0.1:{free_port()}"
    with worker_process(tmp_path / "log", address, prefix=limited(128)) as worker:
        with AttentionWorkerConnection.connect(address) as engine:
            with silent_clients(worker, 1000):
                wait_until(lambda: "clients are connected, and no more are taken" in worker.log)
                with raw_channel(engine, GEOMETRY, NUM_BLOCKS) as channel:
                    channel.send(frame(STEP, b""), DEADLINE)
                    assert b"shorter than its counts" in channel.receive(DEADLINE)
            assert worker.process.poll() is None, worker.log
        with AttentionWorkerConnection.connect(address) as engine:
            engine.configure(GEOMETRY, NUM_BLOCKS)
            check_served(engine)


def test_more_clients_than_are_taken(tmp_path: Path) -> None:
    """The kernel keeps them from ZeroMQ, which would take them all."""
    address = f"127.0.0.1:{free_port()}"
    with worker_process(tmp_path / "log", address, prefix=limited(512)) as worker:
        before = num_descriptors(worker)
        with silent_clients(worker, 700):
            wait_until(lambda: "clients are connected, and no more are taken" in worker.log)
            time.sleep(4.0)  # those that were turned away have asked again by then, twice
            assert num_descriptors(worker) < before + 512 // 2


def test_descriptors_are_bounded(local_worker: Worker) -> None:
    """A generous limit is not taken: each connection that a stranger holds takes memory too."""
    soft, _ = resource.prlimit(local_worker.process.pid, resource.RLIMIT_NOFILE)
    assert soft <= 4096


# Memory.


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A cgroup below this process's own, of either version."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = [Path("/sys/fs/cgroup/memory" + path) for _, names, path in own if "memory" in names.split(",")]
    paths += [Path("/sys/fs/cgroup" + path) for _, names, path in own if names == ""]
    group = paths[0] / f"lamina-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a cgroup here: {error}")
    try:
        if not any((group / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
            pytest.skip("memory is not controlled below this process's cgroup")
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text().split())
        group.rmdir()


def within(group: Path) -> tuple[str, ...]:
    """A prefix of a command that runs in the cgroup."""
    program = (
        "import os, pathlib, sys\n"
        f"pathlib.Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return (sys.executable, "-c", program)


def set_limit(group: Path, limit: int) -> None:
    old = group / "memory.limit_in_bytes"
    (old if old.exists() else group / "memory.max").write_text(str(limit))


EATER = """
import sys
memory = bytearray(b"x") * int(sys.argv[1])
print("full", flush=True)
sys.stdin.read()
"""


def test_pool_that_the_cgroup_cannot_hold_now(tmp_path: Path, memory_cgroup: Path) -> None:
    """It is refused, not killed for it: what was free when the worker started is taken by another process."""
    set_limit(memory_cgroup, POOL_RESERVE_BYTES + (192 << 20))
    address = f"127.0.0.1:{free_port()}"
    eat = [*within(memory_cgroup), sys.executable, "-c", EATER, str(150 << 20)]
    with worker_process(tmp_path / "log", address, prefix=within(memory_cgroup)) as worker:
        with AttentionWorkerConnection.connect(address) as engine:
            num_blocks = (60 << 20) // engine.block_bytes(GEOMETRY)
            with subprocess.Popen(eat, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as eater:
                assert eater.stdout is not None
                assert eater.stdout.readline() == "full\n"
                with pytest.raises(
                    WorkerRefused, match=r"or the cgroup around it, can hold .* now; free memory there"
                ):
                    engine.configure(GEOMETRY, num_blocks)
                eater.communicate(timeout=DEADLINE)
            engine.configure(GEOMETRY, num_blocks)
            check_served(engine)
        assert worker.process.poll() is None


def test_worker_that_the_cgroup_cannot_hold(tmp_path: Path, memory_cgroup: Path) -> None:
    set_limit(memory_cgroup, POOL_RESERVE_BYTES + (32 << 20))
    command = [*CLI, "worker", "--memory", "64MiB", "--listen", f"127.0.0.1:{free_port()}"]
    ended = subprocess.run([*within(memory_cgroup), *command], capture_output=True, text=True, timeout=60.0)
    assert ended.returncode == 2
    assert "--memory 64MiB is more than the" in ended.stderr
    assert (
        "or the cgroup around it" in ended.stderr
        or "cgroup around this process, can hold now" in ended.stderr
    )


def test_shared_memory_file_system_is_not_used(local_worker: Worker) -> None:
    """The channel's memory is a memfd: it counts as this process's memory, not against the size of /dev/shm."""
    free: Callable[[], int] = lambda: os.statvfs("/dev/shm").f_bfree  # noqa: E731
    with AttentionWorkerConnection.connect(local_worker.address) as engine:
        before = free()
        with raw_channel(engine, GEOMETRY, NUM_BLOCKS, ring_bytes=32 << 20) as channel:
            block = os.statvfs("/dev/shm").f_bsize
            for _ in range(3):
                channel.send(bytes(20 << 20), DEADLINE)  # touches 20 MiB of the ring
            assert (before - free()) * block < 4 << 20, format_bytes((before - free()) * block)
