"""ZeroMQ sockets of the control plane: the limits that both ends share, and what their handshakes come to."""

import itertools

import zmq
from zmq.utils.monitor import parse_monitor_message

from vllm_lamina.transport.address import ControlAddress
from vllm_lamina.transport.secret import ControlKeys

Socket = zmq.Socket[bytes]

HANDSHAKE_MS = 5_000
"""A peer that has not said who it is by then is disconnected."""
DEAD_PEER_MS = 10_000
"""Bytes that stay unacknowledged, or pings unanswered, for this long end a connection; ZeroMQ then opens another."""
PING_MS = 2_500

_monitor_numbers = itertools.count()


def set_limits(socket: Socket, address: ControlAddress, max_message_bytes: int) -> None:
    """Bound what a peer may take of memory and time."""
    socket.ipv6 = "[" in address.endpoint
    socket.maxmsgsize = max_message_bytes
    socket.sndhwm = socket.rcvhwm = 16
    socket.backlog = 256
    socket.handshake_ivl = HANDSHAKE_MS
    if not address.is_ipc:
        socket.tcp_maxrt = DEAD_PEER_MS  # Linux's TCP_USER_TIMEOUT
        socket.heartbeat_ivl = PING_MS
        socket.heartbeat_timeout = socket.heartbeat_ttl = DEAD_PEER_MS


def use_client_keys(socket: Socket, keys: ControlKeys) -> None:
    """Encrypt, and prove to the worker, and have it prove, that both hold the secret."""
    socket.curve_serverkey = keys.worker_public
    socket.curve_publickey, socket.curve_secretkey = keys.client_public, keys.client_secret


class SocketMonitor:
    """Events of a socket's connections."""

    def __init__(self, socket: Socket, events: int) -> None:
        endpoint = f"inproc://monitor-{next(_monitor_numbers)}"
        self._monitored = socket
        socket.monitor(endpoint, events)
        self.socket: Socket = socket.context.socket(zmq.PAIR)
        # With a limit, ZeroMQ's thread would wait, and all connections with it, until the events are read.
        self.socket.rcvhwm = 0
        self.socket.linger = 0
        self.socket.connect(endpoint)

    def next_event(self) -> tuple[int, int] | None:
        """Return the oldest event and its value, None if there is none."""
        try:
            message = parse_monitor_message(self.socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return None
        return message["event"], message["value"]

    def close(self) -> None:
        """Stop watching."""
        self._monitored.disable_monitor()
        self.socket.close()
