"""A worker on another host, over UCX: what it computes, how its engine's end is noticed, and how its own is."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine import Engine, Request
from network import PORT, Host, hosts
from worker_processes import DEADLINE, Worker, pause, wait_until, worker_process

from vllm_lamina._native import AttentionWorkerError, ChannelClosed
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.secret import write_secret

GEOMETRY = Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125))
NUM_BLOCKS = 8
RING_BYTES = 1 << 20
LEASE = 5
"""Seconds: short, yet longer than a busy machine keeps a heartbeat waiting."""


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    write_secret(tmp_path / "secret")
    return tmp_path / "secret"


@pytest.fixture
def there() -> Iterator[Host]:
    with hosts(1) as [there]:
        yield there


@pytest.fixture
def worker(there: Host, tmp_path: Path, secret: Path) -> Iterator[Worker]:
    arguments = ("--secret-file", str(secret), "--lease-seconds", str(LEASE), "--drain-seconds", "300")
    with worker_process(
        tmp_path / "log", f"{there.address}:{PORT}", *arguments, prefix=there.prefix
    ) as worker:
        yield worker


@pytest.fixture
def connection(worker: Worker, secret: Path) -> Iterator[AttentionWorkerConnection]:
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as connection:
        yield connection


def configure(connection: AttentionWorkerConnection, heartbeat_timeout: float = DEADLINE) -> None:
    """Open the channel; a worker that is only slow is not lost, unless told otherwise."""
    connection.configure(GEOMETRY, NUM_BLOCKS, ring_bytes=RING_BYTES, heartbeat_timeout=heartbeat_timeout)


def run_steps(connection: AttentionWorkerConnection) -> None:
    engine = Engine.on(connection, GEOMETRY, NUM_BLOCKS)
    engine.step(0, [Request(0, 64, [3, 4])])
    engine.step(1, [Request(63, 1, [3, 4])])
    engine.step(1, [Request(64, 1, [3, 4, 1]), Request(0, 20, [5])])


def test_engines_one_after_the_other(
    connection: AttentionWorkerConnection, worker: Worker, secret: Path
) -> None:
    configure(connection)
    run_steps(connection)
    connection.close()
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as second:
        configure(second)
        run_steps(second)
        worker.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in worker.log)
        run_steps(second)
    assert worker.process.wait(DEADLINE) == 0
    assert "other hosts are served over UCX" in worker.log
    assert "channel over tcp/" in worker.log


def test_stopped_worker_ends_a_native_wait(connection: AttentionWorkerConnection, worker: Worker) -> None:
    configure(connection, heartbeat_timeout=1.0)
    engine = Engine.on(connection, GEOMETRY, NUM_BLOCKS)
    engine.begin_step(1, [Request(3, 1, [1])])
    pause(worker.process.pid)
    engine.post(0)
    with pytest.raises((ChannelClosed, AttentionWorkerError)):
        engine.collect_and_check(0)
    wait_until(lambda: not connection.alive)


def test_cut_link(connection: AttentionWorkerConnection, worker: Worker, there: Host) -> None:
    """Neither end is told: the engine's waits end, and the worker drops its pool."""
    configure(connection, heartbeat_timeout=1.0)
    engine = Engine.on(connection, GEOMETRY, NUM_BLOCKS)
    engine.begin_step(1, [Request(3, 1, [1])])
    there.cut_link()
    engine.post(0)
    with pytest.raises(ChannelClosed):
        engine.collect_and_check(0)
    wait_until(lambda: not connection.alive)
    assert re.search(r"is lost: it has not answered for \d+\.\d s", connection.lost_reason)
    wait_until(lambda: f"sent no heartbeat for {LEASE} s" in worker.log or "engine left" in worker.log)


ENGINE = """
import sys, time
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.kv_cache.geometry import Geometry

connection = AttentionWorkerConnection.connect(sys.argv[1], secret_file=sys.argv[2])
connection.configure(Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125)), 8, ring_bytes=1 << 20)
print("ready", flush=True)
time.sleep(60)
"""


def test_killed_engine_frees_the_worker(worker: Worker, secret: Path) -> None:
    command = [sys.executable, "-c", ENGINE, worker.address, str(secret)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == "ready\n"
        engine.kill()
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as connection:
        wait_until(lambda: not connection.stats().connected)
        configure(connection)
        run_steps(connection)
