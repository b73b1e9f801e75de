"""Workers and engines whose control connection is not at the address that UCX takes of its interface."""

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_end import GEOMETRY, NUM_BLOCKS
from network import HERE, INTERFACE, PORT, Host, hosts, listening_ports
from worker_processes import DEADLINE, Worker, free_port, worker_process

from vllm_lamina._native import UcxChannel
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import ConnectionFailed, WorkerRefused
from vllm_lamina.transport.secret import write_secret
from vllm_lamina.transport.ucx import TOKEN_BYTES, load_ucx
from vllm_lamina.wire.messages import Configure, Configured, Goodbye, Leave, Network, OpenUcx, UcxOpened

ENGINE = Path(__file__).parent / "engine_end.py"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    write_secret(tmp_path / "secret")
    return tmp_path / "secret"


def address_of(host: Host, add: int = 0) -> str:
    """The host's first IPv4 address, or one that lies so much further."""
    network, _, last = host.address.rpartition(".")
    return f"{network}.{int(last) + add}"


@contextmanager
def engine_on(host: Host, secret: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [*host.prefix, sys.executable, str(ENGINE), str(secret)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ask(engine: "subprocess.Popen[str]", line: str) -> str:
    """What the engine says to a worker's address."""
    assert engine.stdin is not None
    assert engine.stdout is not None
    engine.stdin.write(line + "\n")
    engine.stdin.flush()
    return engine.stdout.readline().strip()


def leave(engine: "subprocess.Popen[str]") -> None:
    assert engine.stdin is not None
    engine.stdin.write("\n")
    engine.stdin.flush()


def reaches(host: Host, addresses: list[str], port: int) -> bool:
    """Whether a connection from the host to one of these comes about."""
    program = f"""
import contextlib, socket
for address in {addresses}:
    with contextlib.suppress(OSError), socket.create_connection((address, {port}), 0.5):
        print("connected")
"""
    command = [*host.prefix, sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE)
    return "connected" in done.stdout


def test_further_addresses(tmp_path: Path, secret: Path) -> None:
    """A second IPv4 address, a labelled one, IPv6; on the engine's side too. UCX stays closed to a third host."""
    arguments = ("--secret-file", str(secret))
    with hosts(3) as [there, here, elsewhere]:
        for number, host in enumerate((there, here, elsewhere), start=1):
            host.ip("address", "add", f"{address_of(host, 100)}/24", "dev", INTERFACE)
            host.ip(
                *("address", "add", f"{address_of(host, 200)}/24"),
                *("dev", INTERFACE, "label", f"{INTERFACE}:1"),
            )
            for last in (number, 100 + number):
                host.ip("address", "add", f"fd00:250::{last:x}/64", "dev", INTERFACE, "nodad")
        subnet = address_of(here).rpartition(".")[0] + ".0/24"
        with (
            worker_process(tmp_path / "log", f"[::]:{PORT}", *arguments, prefix=there.prefix) as worker,
            engine_on(here, secret) as engine,
        ):
            for source in (0, 100):
                here.ip("route", "replace", subnet, "dev", INTERFACE, "src", address_of(here, source))
                for target in (address_of(there, 100), address_of(there, 200), "[fd00:250::65]"):
                    assert ask(engine, f"{target}:{PORT}") == "right", (source, target)
                    leave(engine)
            for target in (address_of(there, 100), "[fd00:250::1]"):
                assert ask(engine, f"{target}:{PORT}") == "right", target
                [port] = listening_ports(worker.process.pid) - {PORT}
                ends = ["fd00:250::1", "fd00:250::65"] if ":" in target else [there.address]
                assert reaches(here, ends, port)
                assert not reaches(elsewhere, ends, port)
                leave(engine)


def test_an_address_of_ucx_without_a_way_is_named(tmp_path: Path, secret: Path) -> None:
    """The interface's first address is in a network that the engine does not reach."""
    arguments = ("--secret-file", str(secret))
    with hosts(1) as [there]:
        there.ip("address", "flush", "dev", INTERFACE)
        there.ip("address", "add", "10.99.0.1/24", "dev", INTERFACE)
        there.ip("address", "add", f"{there.address}/24", "dev", INTERFACE)
        address = f"{there.address}:{PORT}"
        with (
            worker_process(tmp_path / "log", address, *arguments, prefix=there.prefix),
            AttentionWorkerConnection.connect(address, 3.0, secret_file=secret) as connection,
        ):
            with pytest.raises(ConnectionFailed) as failed:
                connection.configure(GEOMETRY, NUM_BLOCKS, ring_bytes=1 << 20)
            assert f"to the attention worker at {address} could not be opened over UCX" in str(failed.value)
            assert f"here ({HERE}) with {INTERFACE} there (10.99.0.1, {there.address})" in str(failed.value)
            assert connection.stats().connected, "the worker goes on answering"


@pytest.fixture(scope="module")
def local_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker_process(tmp_path_factory.mktemp("worker") / "log", f"127.0.0.2:{free_port()}") as worker:
        yield worker


def test_a_worker_does_not_wait_for_an_engine_that_it_cannot_reach(local_worker: Worker) -> None:
    """Where packets are dropped, as a firewall does, a connection that is waited for holds up everything else."""
    load_ucx()
    token = secrets.token_bytes(TOKEN_BYTES)
    closed = UcxChannel(token, 1 << 16, 0, "lo")  # admits nobody
    with AttentionWorkerConnection.connect(local_worker.address) as connection:
        request = Configure(GEOMETRY, NUM_BLOCKS, 0, transport="ucx", host="127.0.0.2")
        configured = connection._control.request(request, Configured)
        assert configured.network == Network("lo", ("127.0.0.1", "::1", "127.0.0.2"))
        begin = time.monotonic()
        here = Network("lo", ("127.0.0.1",))
        open_ucx = OpenUcx(configured.token, token, 1 << 16, closed.address, here)
        connection._control.request(open_ucx, UcxOpened)
        assert connection.stats().connected
        assert time.monotonic() - begin < 5.0
        connection._control.request(Leave(configured.token), Goodbye)


@pytest.mark.parametrize("host", ["192.0.2.9", "memory-1", ""])
def test_a_worker_without_the_address_at_which_it_is_reached(local_worker: Worker, host: str) -> None:
    """As behind NAT: it says so before it takes memory."""
    with AttentionWorkerConnection.connect(local_worker.address) as connection:
        request = Configure(GEOMETRY, NUM_BLOCKS, 0, transport="ucx", host=host)
        with pytest.raises(WorkerRefused, match=host or "'' does not appear to be an IPv4 or IPv6 address"):
            connection._control.request(request, Configured)
        assert not connection.stats().connected
