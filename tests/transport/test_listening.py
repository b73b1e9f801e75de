"""Keeping new connections from a socket."""

import select
import socket
from collections.abc import Iterator

import pytest

from vllm_lamina._native import admit_connections, refuse_connections

DEADLINE = 30.0


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def server(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    host = "127.0.0.1" if request.param == socket.AF_INET else "::1"
    try:
        server = socket.create_server((host, 0), family=request.param)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    with server:
        server.settimeout(DEADLINE)
        yield server


def new_client(server: socket.socket) -> socket.socket:
    client = socket.socket(server.family)
    client.setblocking(False)
    client.connect_ex(server.getsockname())
    return client


def is_connected(client: socket.socket, seconds: float) -> bool:
    return bool(select.select([], [client], [], seconds)[1])


def test_refuse_and_admit(server: socket.socket) -> None:
    """Who comes while it refuses is connected once it admits; earlier connections stay, accepted or waiting."""
    with new_client(server) as accepted, server.accept()[0] as connection, new_client(server) as waiting:
        assert is_connected(waiting, DEADLINE)
        refuse_connections(server.fileno())
        with new_client(server) as late:
            assert not is_connected(late, 0.5)
            accepted.send(b"still here")
            connection.settimeout(DEADLINE)
            assert connection.recv(64) == b"still here"
            with server.accept()[0] as second:
                waiting.send(b"this one too")
                second.settimeout(DEADLINE)
                assert second.recv(64) == b"this one too"
            admit_connections(server.fileno())
            assert is_connected(late, DEADLINE)  # it asks again by itself
            assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    with new_client(server) as client:
        assert is_connected(client, DEADLINE)
