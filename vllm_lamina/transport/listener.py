"""The worker's end of the control plane: who may connect, and what they ask."""

import logging
import os
import socket
import time

import zmq
from zmq.utils import z85

from vllm_lamina._native import ChannelError, admit_connections, refuse_connections
from vllm_lamina.transport.address import ControlAddress
from vllm_lamina.transport.errors import ConnectionFailed
from vllm_lamina.transport.secret import ControlKeys
from vllm_lamina.transport.sockets import HANDSHAKE_MS, Socket, SocketMonitor, set_limits

logger = logging.getLogger("vllm_lamina.attention_worker")

MAX_REQUEST_BYTES = 256 << 10
"""A geometry may say a number for every head of every layer."""

REFUSED_LOG_SECONDS = 1.0
"""At most one line about refused clients in this time, so that they cannot fill the log."""

MAX_WAITING_CLIENTS = 32
"""Connections that the kernel makes before ZeroMQ accepts them."""

ZAP_ENDPOINT = "inproc://zeromq.zap.01"


class ControlListener:
    """Takes requests from its clients, in turn. With keys, only from those that hold the secret.

    Parameters
    ----------
    max_clients
        Connections with which no more are taken, until half of them are gone. ZeroMQ itself takes all that come,
        and where it gets no descriptor for the next it asks for one without a pause. Some more may come before this
        thread runs, and then the `MAX_WAITING_CLIENTS` that the kernel has connected already.

    Attributes
    ----------
    sockets
        To be polled; when one of them is readable, call `admit`.
    refused_clients
        Peers that were turned away.

    Raises
    ------
    ConnectionFailed
        The address is in use, or not this host's.
    """

    EVENTS = (
        zmq.Event.LISTENING
        | zmq.Event.ACCEPTED
        | zmq.Event.DISCONNECTED
        | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
        | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
        | zmq.Event.HANDSHAKE_FAILED_AUTH
    )

    def __init__(self, address: ControlAddress, keys: ControlKeys | None, max_clients: int) -> None:
        self.refused_clients = 0
        self._max_clients = max_clients
        self._is_ipc = address.is_ipc
        self._keys = keys
        self._unlogged = 0
        self._last_log = -REFUSED_LOG_SECONDS
        self._peers: dict[int, str] = {}
        self._refusing = False
        self._listening: int | None = None  # ZeroMQ's descriptor, where connections can be refused
        self._is_full = False
        self._context: zmq.Context[Socket] = zmq.Context()
        # Bound before the control socket: without it every key would do.
        self._zap = self._context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(ZAP_ENDPOINT)
        self.control = self._context.socket(zmq.ROUTER)
        self.control.linger = 1000
        set_limits(self.control, address, MAX_REQUEST_BYTES)
        self.control.backlog = MAX_WAITING_CLIENTS
        if keys is not None:
            self.control.curve_server = 1
            self.control.curve_publickey, self.control.curve_secretkey = (
                keys.worker_public,
                keys.worker_secret,
            )
            self.control.zap_domain = b"vllm-lamina"
        self._monitor = SocketMonitor(self.control, self.EVENTS)
        self.sockets = (self.control, self._zap, self._monitor.socket)
        try:
            self.control.bind(address.endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConnectionFailed(f"cannot listen on {address.text}: {error.strerror}") from error

    def admit(self) -> None:
        """Judge the clients that wait for it, take note of those that were refused, and let no more in than may be."""
        while self._zap.poll(0):
            self._zap.send_multipart(self._zap_reply(self._zap.recv_multipart()))
        while event := self._monitor.next_event():
            kind, value = event
            if kind == zmq.Event.LISTENING:
                # No one but this user reaches a socket that is a file.
                self._listening = None if self._is_ipc else value
            elif kind == zmq.Event.ACCEPTED:
                self._peers[value] = _peer_address(value)
            elif kind == zmq.Event.DISCONNECTED:
                # ZeroMQ's failure of a handshake names no connection; its end follows it directly.
                peer = self._peers.pop(value, "unknown")
                if self._refusing:
                    self._refusing = False
                    self._note_refused(peer)
            else:
                self._refusing = True
        self._limit_clients()

    def _limit_clients(self) -> None:
        if self._listening is None:
            return
        if not self._is_full and len(self._peers) >= self._max_clients:
            try:
                refuse_connections(self._listening)
            except ChannelError as error:
                logger.warning("this system cannot keep more clients out (%s): a firewall has to", error)
                self._listening = None
                return
            self._is_full = True
            logger.warning(
                "%d clients are connected, and no more are taken until half of them are gone; who says nothing is "
                "disconnected after %g s",
                len(self._peers),
                HANDSHAKE_MS / 1000,
            )
        elif self._is_full and len(self._peers) <= self._max_clients // 2:
            self._is_full = False
            admit_connections(self._listening)

    def _zap_reply(self, request: list[bytes]) -> list[bytes]:
        """ZeroMQ's authentication protocol (RFC 27): the client's key must be the one derived from the secret."""
        version, request_id, _domain, _address, _identity, _mechanism, *credentials = request
        admitted = self._keys is not None and credentials == [z85.decode(self._keys.client_public)]
        status = (b"200", b"OK") if admitted else (b"400", b"another secret")
        return [version, request_id, *status, b"", b""]

    def _note_refused(self, peer: str) -> None:
        self.refused_clients += 1
        self._unlogged += 1
        now = time.monotonic()
        if now - self._last_log < REFUSED_LOG_SECONDS:
            return
        reason = (
            "it is no client of vllm-lamina, or uses a secret, of which this worker has none"
            if self._keys is None
            else "it did not prove that it holds this worker's secret; give it the same secret file"
        )
        others = f" (and {self._unlogged - 1} others since the last such line)" if self._unlogged > 1 else ""
        logger.warning(
            "refused a client at %s%s: %s; %d refused so far", peer, others, reason, self.refused_clients
        )
        self._last_log, self._unlogged = now, 0

    def receive(self) -> tuple[list[bytes], bytes]:
        """Return the oldest request, and the envelope to answer in."""
        *envelope, payload = self.control.recv_multipart()
        return envelope, payload

    def answer(self, envelope: list[bytes], payload: bytes) -> None:
        """Send an answer; it is dropped if its client is gone."""
        self.control.send_multipart([*envelope, payload])

    def close(self) -> None:
        """Send what is still to be sent, for a second at most, and close the port."""
        self._monitor.close()
        self.control.close()
        self._zap.close()
        self._context.term()


def _peer_address(descriptor: int) -> str:
    """The address at the other end of ZeroMQ's own socket, which may be closed already."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            peer = connection.getpeername()
    except OSError:
        return "unknown"
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "this host"
