"""Who may use a worker and when, and that nothing of it is left behind, however its users end."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
from engine import Engine, Request
from test_cli import serving
from wire_frames import STEP, frame, raw_channel
from worker_processes import DEADLINE, pause, stuck_thread, wait_until

from vllm_lamina._native import AttentionWorkerError, ChannelClosed, create_shm_memory
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import WorkerRefused, WorkerUnreachable
from vllm_lamina.wire.messages import (
    PROTOCOL_VERSION,
    Configure,
    Configured,
    Refused,
    WorkerStats,
    decode_reply,
    encode,
)

GEOMETRY = Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125))
NUM_BLOCKS = 8
LONG_LIFE = 180.0
"""Seconds that a process hangs which a test ends, at the latest."""


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for a parent that is not ours to collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_starts_without_the_heavy_parts(worker: EmbeddedAttentionWorker) -> None:
    maps = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "_native" in maps
    assert not [name for name in ("numpy", "torch", "vllm/") if name in maps]


def test_next_engine_gets_a_clean_pool(worker: EmbeddedAttentionWorker) -> None:
    for _ in range(3):
        with AttentionWorkerConnection.connect(worker.address) as connection:
            used = connection.configure(GEOMETRY, NUM_BLOCKS)
            assert used >= NUM_BLOCKS * connection.block_bytes(GEOMETRY)
            engine = Engine.on(connection, GEOMETRY, NUM_BLOCKS)
            engine.step(1, [Request(33, 1, [3, 4])])  # attends zeros where an earlier engine left its tokens
            engine.step(0, [Request(0, 64, [3, 4])])
            engine.step(1, [Request(63, 1, [3, 4])])
            stats = connection.stats()
            assert (stats.steps, stats.messages, stats.tokens_appended) == (3, 9, 2 * 66)
            assert stats.bytes_in > 0
            assert stats.ns_attending > 0
            assert stats.num_blocks == NUM_BLOCKS


def test_one_engine_at_a_time(connection: AttentionWorkerConnection, worker: EmbeddedAttentionWorker) -> None:
    connection.configure(GEOMETRY, NUM_BLOCKS)
    engine = Engine.on(connection, GEOMETRY, NUM_BLOCKS)
    with AttentionWorkerConnection.connect(worker.address) as second:
        with pytest.raises(WorkerRefused, match=f"serves another engine \\(pid {os.getpid()} on"):
            second.configure(GEOMETRY, NUM_BLOCKS)
        assert second.stats().connected
        engine.step(0, [Request(0, 10, [1])])
        connection.close()
        second.configure(GEOMETRY, NUM_BLOCKS)
        Engine.on(second, GEOMETRY, NUM_BLOCKS).step(0, [Request(0, 10, [1])])


def test_pool_too_small(connection: AttentionWorkerConnection) -> None:
    too_many = connection.pool_bytes // connection.block_bytes(GEOMETRY) + 1
    with pytest.raises(WorkerRefused, match=f"{too_many} KV blocks take .* more than the worker's 1 GiB"):
        connection.configure(GEOMETRY, too_many)
    connection.configure(GEOMETRY, too_many - 1)


def test_unsupported_geometry_is_named(connection: AttentionWorkerConnection) -> None:
    odd = Geometry.uniform(2, 32, 4, 2, 20, "float32", (0.125, 0.125))
    for ask in (connection.block_bytes, lambda geometry: connection.configure(geometry, NUM_BLOCKS)):
        with pytest.raises(WorkerRefused, match="20"):
            ask(odd)
    assert connection.stats() == WorkerStats(connected=False, pool_bytes=1 << 30)


def test_data_channel_needs_the_token(connection: AttentionWorkerConnection) -> None:
    configured = connection._control.request(Configure(GEOMETRY, NUM_BLOCKS, 0), Configured)
    memory_fd = create_shm_memory(1 << 20)
    for token in (b"", b"guess", bytes(len(configured.token)), configured.token + b"x"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger, pytest.raises(WorkerRefused):
            connection._try_data_socket(stranger, token or b"\0", memory_fd)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger, pytest.raises(WorkerRefused):
        connection._try_data_socket(stranger, configured.token, os.open("/dev/null", os.O_RDWR))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as owner:
        connection._try_data_socket(owner, configured.token, memory_fd)
        assert connection.stats().connected
    os.close(memory_fd)


def test_pool_that_is_never_used_is_freed(connection: AttentionWorkerConnection) -> None:
    connection._control.request(Configure(GEOMETRY, NUM_BLOCKS, 0), Configured)
    with pytest.raises(WorkerRefused, match="serves another engine"):
        connection.configure(GEOMETRY, NUM_BLOCKS)
    wait_until(lambda: not connection.stats().connected)
    connection.configure(GEOMETRY, NUM_BLOCKS)


def test_killed_worker_is_noticed(
    connection: AttentionWorkerConnection, worker: EmbeddedAttentionWorker
) -> None:
    """Long before the heartbeats would tell."""
    connection.configure(GEOMETRY, NUM_BLOCKS, heartbeat_timeout=10 * DEADLINE)
    engine = Engine.on(connection, GEOMETRY, NUM_BLOCKS)
    engine.begin_step(1, [Request(3, 1, [1])])
    pause(worker.pid)
    engine.post(0)
    os.kill(worker.pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(ChannelClosed):
        engine.collect_and_check(0)
    assert time.monotonic() - begin < DEADLINE
    wait_until(lambda: worker.poll() == -signal.SIGKILL)


def test_stuck_serving_loop_is_noticed(
    connection: AttentionWorkerConnection, worker: EmbeddedAttentionWorker
) -> None:
    """Its process goes on to answer heartbeats."""
    connection.configure(GEOMETRY, NUM_BLOCKS, heartbeat_timeout=0.2)
    engine = Engine.on(connection, GEOMETRY, NUM_BLOCKS)
    engine.begin_step(1, [Request(3, 1, [1])])
    with stuck_thread(worker.pid, "lamina-serve"):
        engine.post(0)
        with pytest.raises(ChannelClosed):
            engine.collect_and_check(0)
    assert "it answers, but its serving loop has stood still for 3 s" in connection.lost_reason


def test_rejected_frame_reaches_the_caller(connection: AttentionWorkerConnection) -> None:
    """A block id that the client cannot judge."""
    connection.configure(GEOMETRY, NUM_BLOCKS)
    engine = Engine.on(connection, GEOMETRY, 2 * NUM_BLOCKS)
    engine.begin_step(1, [Request(3, 1, [NUM_BLOCKS])])
    engine.post(0)
    with pytest.raises(AttentionWorkerError, match="names a block outside the pool"):
        engine.collect_and_check(0)


def _connect_and_hang(address: str, with_child: bool, ready: "multiprocessing.connection.Connection") -> None:
    connection = AttentionWorkerConnection.connect(address)
    connection.configure(GEOMETRY, NUM_BLOCKS)
    child = os.fork() if with_child else 0
    if with_child and child == 0:
        time.sleep(LONG_LIFE)  # a child that inherited the data socket
        os._exit(0)
    ready.send(child)
    time.sleep(LONG_LIFE)


@pytest.mark.parametrize("with_child", [False, True])
def test_killed_engine_frees_the_worker(worker: EmbeddedAttentionWorker, with_child: bool) -> None:
    here, there = multiprocessing.Pipe()
    engine = multiprocessing.get_context("fork").Process(
        target=_connect_and_hang, args=(worker.address, with_child, there), daemon=True
    )
    engine.start()
    assert here.poll(DEADLINE)
    child = here.recv()
    engine.kill()
    wait_until(lambda: not engine.is_alive())
    with AttentionWorkerConnection.connect(worker.address) as connection:
        wait_until(lambda: not connection.stats().connected)
        connection.configure(GEOMETRY, NUM_BLOCKS)
    if with_child:
        os.kill(child, signal.SIGKILL)


PARENT = """
import sys, time
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker

worker = EmbeddedAttentionWorker.start(1 << 30)
connection = AttentionWorkerConnection.connect(worker.address)
if sys.argv[1] == "busy":
    connection.configure(Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125)), 8)
print(worker.pid, flush=True)
time.sleep(180)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_worker_ends_with_its_killed_parent(state: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            worker_pid = int(parent.stdout.readline())
            assert not has_ended(worker_pid)
        finally:
            parent.kill()
        wait_until(lambda: has_ended(worker_pid))


def test_signals(worker: EmbeddedAttentionWorker) -> None:
    """Ctrl-C is the parent's to decide; SIGTERM ends the worker at once, with an engine connected too."""
    os.kill(worker.pid, signal.SIGINT)
    with AttentionWorkerConnection.connect(worker.address) as connection:
        connection.configure(GEOMETRY, NUM_BLOCKS)
        os.kill(worker.pid, signal.SIGTERM)
        wait_until(lambda: worker.poll() is not None)
    assert worker.poll() == 0


def test_stop_leaves_no_process(worker: EmbeddedAttentionWorker) -> None:
    pid = worker.pid
    worker.stop()
    assert not Path(f"/proc/{pid}").exists(), "ended and collected"
    worker.stop()
    with pytest.raises(WorkerUnreachable):
        AttentionWorkerConnection.connect(worker.address, timeout=0.2)


def test_stopped_worker_is_killed(worker: EmbeddedAttentionWorker) -> None:
    pause(worker.pid)
    worker.stop(timeout=0.2)
    assert worker.poll() == -signal.SIGKILL


def test_failed_start_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerUnreachable, match="exit status 2; see its output"):
        EmbeddedAttentionWorker.start(1 << 30, cpus=[4095])
    assert "--cpus: this process may not run on CPUs 4095" in capfd.readouterr().err


def test_nothing_on_disk(connection: AttentionWorkerConnection, worker: EmbeddedAttentionWorker) -> None:
    """The channel's memory and the sockets have no names in any file system."""
    before = set(os.listdir("/dev/shm"))
    # This process runs other tests too, whose libraries may have mapped semaphores of their own.
    mapped_before = {pid: shared_memory_files(pid) for pid in (worker.pid, os.getpid())}
    with raw_channel(connection, GEOMETRY, NUM_BLOCKS) as channel:
        channel.send(frame(STEP, b""), DEADLINE)
        channel.receive(DEADLINE)
        for pid in (worker.pid, os.getpid()):
            assert "memfd:vllm-lamina channel" in Path(f"/proc/{pid}/maps").read_text()
            assert shared_memory_files(pid) <= mapped_before[pid]
        opened = [os.readlink(fd) for fd in Path(f"/proc/{worker.pid}/fd").iterdir()]
        assert not [name for name in opened if name.startswith("/dev/shm")]
        assert not [line for line in unix_socket_names(worker.pid) if not line.startswith("@")]
    assert set(os.listdir("/dev/shm")) <= before


def shared_memory_files(pid: int) -> set[str]:
    """Return the files of /dev/shm that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}


def unix_socket_names(pid: int) -> list[str]:
    """Return the names of a process's unix sockets; the abstract ones begin with @."""
    inodes = {
        os.readlink(fd)[8:-1] for fd in Path(f"/proc/{pid}/fd").iterdir() if "socket:" in os.readlink(fd)
    }
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [line[7] for line in lines if len(line) > 7 and line[6] in inodes]


def test_rubbish_on_the_control_socket(
    connection: AttentionWorkerConnection, worker: EmbeddedAttentionWorker
) -> None:
    """What is no message is refused with a reason, and the next message is answered."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(worker.address)
        for payload in (
            b"",
            b"\xc1",
            b"\x80",
            encode({"type": "later"}),
            encode({"type": "configure"}),
            bytes(60_000),
            encode({"type": "hello", "software_version": "x"}).replace(b"x", b"\xff"),  # no UTF-8
            encode({"type": "stats", "more": None})[:-1] + b"\x91" * 60_000 + b"\xc0",  # arrays in arrays
            encode({"type": "hello", "more": None})[:-1] + b"\x91" * 60_000 + b"\xc0",
        ):
            stranger.send_multipart([b"", payload])
            assert stranger.poll(int(DEADLINE * 1000))
            reply = decode_reply(stranger.recv_multipart()[-1])
            assert isinstance(reply, Refused)
            assert f"is not one of protocol {PROTOCOL_VERSION}" in reply.reason
        stranger.send(b"")
        stranger.send_multipart([b"x"] * 10)
        stranger.send_multipart([b"", bytes(10**6)])  # too large: ends the connection
    assert not connection.stats().connected


def test_rubbish_on_the_tcp_port() -> None:
    with serving() as (address, process):
        for payload in (b"GET / HTTP/1.0\r\n\r\n", bytes(1000), b"\xff" + bytes(8) + b"\x7f" + bytes(100)):
            host, port = address.split(":")
            with socket.create_connection((host, int(port)), timeout=DEADLINE) as stranger:
                stranger.sendall(payload)
        with AttentionWorkerConnection.connect(address) as connection:
            assert not connection.stats().connected
        assert process.poll() is None


def test_error_of_a_step_without_queries_reaches_the_next(connection: AttentionWorkerConnection) -> None:
    """Nobody waits for a prefill chunk without context; its lost KV must not go unnoticed."""
    connection.configure(GEOMETRY, NUM_BLOCKS)
    engine = Engine.on(connection, GEOMETRY, 2 * NUM_BLOCKS)
    engine.step(0, [Request(0, 20, [NUM_BLOCKS])])
    engine.begin_step(1, [Request(3, 1, [1])])
    engine.post(0)
    with pytest.raises(AttentionWorkerError, match="names a slot outside the pool"):
        engine.collect_and_check(0)
    engine.client.generation += 1
    with pytest.raises(AttentionWorkerError, match=r"outside the pool|is not in"):
        engine.step(1, [Request(3, 1, [NUM_BLOCKS])])
