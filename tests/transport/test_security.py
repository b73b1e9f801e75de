"""Who gets in, what those read who do not, and that they cannot hurt the engine that is served."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from network import HERE, PORT, Host, hosts, listening_ports
from worker_processes import (
    DEADLINE,
    Worker,
    cli,
    free_port,
    pause,
    wait_until,
    worker_process,
)

from vllm_lamina._native import ChannelClosed
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import SecretError, WorkerRefused, WorkerUnreachable
from vllm_lamina.transport.secret import ControlKeys, write_secret
from vllm_lamina.wire.messages import StatsRequest, encode

GEOMETRY = Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125))
LEASE = 8
"""Seconds: short, yet longer than a busy machine keeps a heartbeat waiting."""


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "secret"
    write_secret(path)
    return path


@pytest.fixture(scope="module")
def other_secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "other"
    write_secret(path)
    return path


@pytest.fixture
def worker(tmp_path: Path, secret: Path) -> Iterator[Worker]:
    """With a secret, and a short lease; it waits long for its engine to leave."""
    arguments = ("--secret-file", str(secret), "--lease-seconds", str(LEASE), "--drain-seconds", "300")
    with worker_process(tmp_path / "log", f"127.0.0.1:{free_port()}", *arguments) as worker:
        yield worker


# The secret file.


def test_secret_command(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert "copy it to every machine" in cli("secret", str(path)).stdout
    assert path.stat().st_mode & 0o777 == 0o600
    keys = ControlKeys.from_file(path)
    assert len({keys.worker_public, keys.worker_secret, keys.client_public, keys.client_secret}) == 4
    assert keys == ControlKeys.from_secret(path.read_bytes().strip()), "derived, hence equal everywhere"
    again = cli("secret", str(path))
    assert again.returncode == 1
    assert "File exists" in again.stderr


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (
            None,
            0o600,
            r"cannot be read \(No such file or directory\).*make one with `vllm-lamina secret FILE`",
        ),
        (b"x" * 64, 0o644, "can be read by others than its owner; run: chmod 600"),
        (b"x" * 64, 0o640, "can be read by others than its owner; run: chmod 600"),
        (b"x" * 31 + b"\n", 0o600, "does not hold 32 to 4096 bytes; make one with"),
        (b"x" * 5000, 0o600, "does not hold 32 to 4096 bytes"),
    ],
)
def test_unfit_secret_files(tmp_path: Path, content: bytes | None, mode: int, reason: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(SecretError, match=reason):
        AttentionWorkerConnection.connect("127.0.0.1:1", secret_file=path)


def test_worker_with_an_unfit_secret_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 64)
    path.chmod(0o604)
    ended = cli("worker", "--listen", "0.0.0.0:7100", "--secret-file", str(path))
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "chmod 600" in ended.stderr


@pytest.mark.parametrize("address", ["0.0.0.0:7100", "[::]:7100", "192.0.2.1:7100"])
def test_other_addresses_need_a_secret(address: str) -> None:
    ended = cli("worker", "--listen", address)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert (
        "can be reached from other hosts and needs --secret-file; make one with `vllm-lamina secret FILE`"
        in ended.stderr
    )
    ended = cli("worker", "stats", address)
    assert ended.returncode == 1
    assert "needs a secret: give its secret file with" in ended.stderr


# The handshake.


def test_the_secret_lets_in(worker: Worker, secret: Path) -> None:
    table = cli("worker", "stats", worker.address, "--secret-file", str(secret)).stdout
    assert "engine     none\nrefused    0 clients" in table


def test_clients_that_do_not_hold_the_secret(worker: Worker, secret: Path, other_secret: Path) -> None:
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as engine:
        engine.configure(GEOMETRY, 8)
        begin = time.monotonic()
        with pytest.raises(
            SecretError, match="has another secret than this side: use the same secret file on both"
        ):
            AttentionWorkerConnection.connect(worker.address, timeout=120.0, secret_file=other_secret)
        with pytest.raises(
            SecretError, match="refuses clients without its secret: give its secret file with"
        ):
            AttentionWorkerConnection.connect(worker.address, timeout=120.0)
        assert time.monotonic() - begin < 60.0, "said at once, not by a timeout"
        wait_until(lambda: engine.stats().refused_clients >= 2)
        assert engine.alive
    # A peer that has hung up before the worker looks at it has no address any more.
    assert re.search(
        r"WARNING .* refused a client at (127\.0\.0\.1:\d+|unknown): "
        r"it did not prove that it holds this worker's secret",
        worker.log,
    )


def test_a_secret_where_there_is_none(tmp_path: Path, secret: Path) -> None:
    with worker_process(tmp_path / "log", f"127.0.0.1:{free_port()}") as worker:
        with pytest.raises(SecretError, match="runs without a secret: start it with --secret-file"):
            AttentionWorkerConnection.connect(worker.address, secret_file=secret)
        wait_until(lambda: "uses a secret, of which this worker has none" in worker.log)


def test_right_worker_key_but_another_client_key(worker: Worker, secret: Path, other_secret: Path) -> None:
    """Knowing the worker's public key alone does not let in."""
    keys, other = ControlKeys.from_file(secret), ControlKeys.from_file(other_secret)
    with zmq.Context() as context, context.socket(zmq.REQ) as stranger:
        stranger.linger = 0
        stranger.curve_serverkey = keys.worker_public
        stranger.curve_publickey, stranger.curve_secretkey = other.client_public, other.client_secret
        stranger.connect(f"tcp://{worker.address}")
        stranger.send(b"x")
        assert not stranger.poll(300)
    wait_until(lambda: "refused a client" in worker.log)


@pytest.mark.parametrize("with_secret", [False, True])
@pytest.mark.parametrize(
    "answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.9\r\n"]
)
def test_something_else_on_the_port(answer: bytes | None, with_secret: bool, secret: Path) -> None:
    """A silent listener, one that hangs up, a web server, another protocol."""
    kept = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    if answer:
                        connection.sendall(answer)
                    if answer is None or answer.startswith(b"SSH"):
                        kept.append(connection)
                    else:
                        connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(
            WorkerUnreachable, match="what listens there is another program, or a worker that is stopped"
        ) as raised:
            AttentionWorkerConnection.connect(address, timeout=3.0, secret_file=secret if with_secret else "")
        assert address in str(raised.value)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE)
    for connection in kept:
        connection.close()


# The lease.


def test_lease_is_kept_while_idle(worker: Worker, secret: Path) -> None:
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as engine:
        engine.configure(GEOMETRY, 8)
        time.sleep(1.5 * LEASE)
        assert engine.stats().connected
        assert engine.alive
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as engine:
        assert not engine.stats().connected, "closing tells the worker"


ENGINE = """
import sys, time
from vllm_lamina._native import ChannelError
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.kv_cache.geometry import Geometry

connection = AttentionWorkerConnection.connect(sys.argv[1], secret_file=sys.argv[2])
connection.configure(Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125)), 8)
print("ready", flush=True)
try:
    connection.channel.receive(300.0)
except ChannelError as error:
    print(type(error).__name__, flush=True)
while connection.alive:
    time.sleep(0.01)
print(connection.lost_reason, flush=True)
"""


def test_lease_of_a_stopped_engine_runs_out(worker: Worker, secret: Path) -> None:
    """Looking at the worker does not renew it, and the engine learns what happened when it goes on."""
    command = [sys.executable, "-c", ENGINE, worker.address, str(secret)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
        try:
            assert engine.stdout is not None
            assert engine.stdout.readline() == "ready\n"
            with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as observer:
                with pytest.raises(WorkerRefused, match=f"serves another engine \\(pid {engine.pid} on"):
                    observer.configure(GEOMETRY, 8)
                pause(engine.pid)
                wait_until(lambda: not observer.stats().connected)
                observer.configure(GEOMETRY, 8)
                engine.send_signal(signal.SIGCONT)
                assert engine.stdout.readline() == "ChannelClosed\n"
                assert "does not hold this engine's KV blocks any more" in engine.stdout.readline()
                assert observer.alive
        finally:
            engine.kill()
    assert f"engine sent no heartbeat for {LEASE} s (pid {engine.pid} on" in worker.log


def test_stopped_worker_is_noticed(worker: Worker, secret: Path) -> None:
    """Every wait ends, those in native code too."""
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as engine:
        engine.configure(GEOMETRY, 8)
        pause(worker.process.pid)
        with pytest.raises(ChannelClosed):
            engine.channel.receive(DEADLINE)
        wait_until(lambda: not engine.alive)
        assert re.search(r"is lost: it has not answered for \d+\.\d s", engine.lost_reason)
        worker.process.send_signal(signal.SIGCONT)


# The end of a worker.


def test_draining(worker: Worker, secret: Path) -> None:
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as engine:
        engine.configure(GEOMETRY, 8)
        worker.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in worker.log)
        with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as second:
            with pytest.raises(WorkerRefused, match="is about to end; use another one"):
                second.check_available()
            with pytest.raises(WorkerRefused, match="serves another engine"):
                second.configure(GEOMETRY, 8)
        time.sleep(1.5 * LEASE)
        assert engine.alive
        assert engine.stats().connected
    assert worker.process.wait(DEADLINE) == 0


def test_a_second_signal_ends_at_once(worker: Worker, secret: Path) -> None:
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as engine:
        engine.configure(GEOMETRY, 8)
        worker.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in worker.log)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(DEADLINE) == 0
        with pytest.raises(ChannelClosed):
            engine.channel.receive(DEADLINE)


def test_draining_ends(tmp_path: Path) -> None:
    with (
        worker_process(tmp_path / "log", f"127.0.0.1:{free_port()}", "--drain-seconds", "1") as worker,
        AttentionWorkerConnection.connect(worker.address) as engine,
    ):
        engine.configure(GEOMETRY, 8)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(DEADLINE) == 0


# Floods.


def test_flood_of_strangers_does_not_hurt_the_engine(worker: Worker, secret: Path) -> None:
    """Silent connections, rubbish, refused clients and requests to end, for longer than the lease."""
    host, port = worker.address.split(":")
    stop = threading.Event()
    attempts = [0, 0]

    def connect_and_send(index: int, payload: bytes) -> None:
        held: list[socket.socket] = []
        while not stop.is_set():
            with contextlib.suppress(OSError):
                connection = socket.create_connection((host, int(port)), timeout=1.0)
                held.append(connection)
                connection.sendall(payload)
                attempts[index] += 1
            if len(held) > 100:
                held.pop(0).close()
            time.sleep(0.002)
        for connection in held:
            connection.close()

    def ask_without_secret() -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.sndtimeo = 10
            stranger.reconnect_ivl = 10
            stranger.connect(f"tcp://{worker.address}")
            while not stop.is_set():
                with contextlib.suppress(zmq.Again):
                    stranger.send_multipart([b"", encode(StatsRequest())])

    threads = [
        threading.Thread(target=connect_and_send, args=(0, b"")),
        threading.Thread(target=connect_and_send, args=(1, b"\xff" + bytes(8) + b"\x7f" + bytes(1000))),
        threading.Thread(target=ask_without_secret),
    ]
    begin = time.monotonic()
    with AttentionWorkerConnection.connect(worker.address, secret_file=secret) as engine:
        engine.configure(GEOMETRY, 8)
        for thread in threads:
            thread.start()
        try:
            time.sleep(1.5 * LEASE)
            wait_until(lambda: min(*attempts, engine.stats().refused_clients) > 50)
            assert engine.alive
            assert engine.stats().connected
        finally:
            stop.set()
            for thread in threads:
                thread.join(DEADLINE)
    refusals = worker.log.count("refused a client")
    assert refusals < 2 + time.monotonic() - begin, "one line a second does not flood the log"
    assert worker.process.poll() is None


@pytest.fixture
def there() -> Iterator[Host]:
    with hosts(1) as [there]:
        yield there


def reaches(host: Host, address: str, port: int) -> bool:
    """Whether a connection from the host comes about."""
    program = f"import socket; socket.create_connection(({address!r}, {port}), 1.0)"
    ended = subprocess.run(
        [*host.prefix, sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE
    )
    assert ended.returncode == 0 or "timed out" in ended.stderr, ended.stderr
    return ended.returncode == 0


def test_other_hosts_do_not_reach_the_data_channel(tmp_path: Path, secret: Path) -> None:
    """Not the worker's end, and not the engine's; UCX would let them write to the processes' memory."""
    arguments = ("--secret-file", str(secret))
    with (
        hosts(2) as [there, elsewhere],
        worker_process(
            tmp_path / "log", f"{there.address}:{PORT}", *arguments, prefix=there.prefix
        ) as worker,
        socket.create_server((HERE, 0)) as own,
        AttentionWorkerConnection.connect(worker.address, secret_file=secret) as engine,
    ):
        before = listening_ports(os.getpid())
        engine.configure(GEOMETRY, 8)
        ports = listening_ports(worker.process.pid) - {PORT}
        engine_ports = listening_ports(os.getpid()) - before
        assert ports
        assert engine_ports
        assert reaches(elsewhere, there.address, PORT), "anyone may ask for the secret's proof"
        assert reaches(elsewhere, HERE, own.getsockname()[1])
        for port in ports:
            assert not reaches(elsewhere, there.address, port)
            socket.create_connection((there.address, port), DEADLINE).close()
        for port in engine_ports:
            assert not reaches(elsewhere, HERE, port)
            assert reaches(there, HERE, port)
        assert engine.alive
        assert engine.stats().connected


def test_another_host(there: Host, tmp_path: Path, secret: Path, other_secret: Path) -> None:
    arguments = ("--secret-file", str(secret), "--lease-seconds", "1")
    with worker_process(tmp_path / "log", f"0.0.0.0:{PORT}", *arguments, prefix=there.prefix) as worker:
        address = f"{there.address}:{PORT}"
        assert "engine     none" in cli("worker", "stats", address, "--secret-file", str(secret)).stdout
        ended = cli("trace", address, "--secret-file", str(secret), "--seconds", "0")
        assert "no engine is connected" in ended.stderr
        ended = cli("worker", "stats", address, "--secret-file", str(other_secret))
        assert "has another secret" in ended.stderr
        assert ended.stderr.count("\n") == 1
        # A peer that has hung up before the worker looks at it has no address any more.
        wait_until(lambda: re.search(rf"refused a client at ({re.escape(HERE)}:|unknown)", worker.log))
        with AttentionWorkerConnection.connect(address, secret_file=secret) as engine:
            assert engine.block_bytes(GEOMETRY) > 0
            with pytest.raises(
                WorkerRefused, match="cannot be reached by shared memory: it runs on another host"
            ):
                engine.check_available("shm")
            engine.check_available("auto")
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(DEADLINE) == 0
