"""The client's end of a control connection: one request at a time, and a reason where there is no answer."""

import contextlib
import errno
import socket
import time
from typing import TypeVar

import msgspec
import zmq

from vllm_lamina.transport.address import ControlAddress
from vllm_lamina.transport.errors import ProtocolMismatch, SecretError, WorkerRefused, WorkerUnreachable
from vllm_lamina.transport.secret import MAKE_ONE, ControlKeys
from vllm_lamina.transport.sockets import (
    Socket,
    SocketMonitor,
    set_limits,
    use_client_keys,
)
from vllm_lamina.wire.messages import (
    PROTOCOL_VERSION,
    BlockBytesReply,
    Configured,
    Goodbye,
    Refused,
    Request,
    Trace,
    UcxOpened,
    Welcome,
    WorkerStats,
    decode_reply,
    encode,
)

MAX_REPLY_BYTES = 64 << 20
"""A full trace has 16 MiB."""

GREETING_BYTES = 64
GREETING_SECONDS = 2.0

SECRET_OPTIONS = "--lamina-secret-file (of the serving side) or --secret-file (of vllm-lamina)"

ReplyT = TypeVar("ReplyT", Welcome, BlockBytesReply, Configured, UcxOpened, WorkerStats, Trace, Goodbye)


class ControlClient:
    """Asks one worker. Not thread-safe.

    Raises
    ------
    SecretError
        The address can be reached from other hosts, and there are no keys.
    """

    def __init__(
        self,
        address: ControlAddress,
        keys: ControlKeys | None,
        timeout: float,
        waits_for_listener: bool = True,
    ) -> None:
        if address.needs_secret and keys is None:
            raise SecretError(
                f"the attention worker at {address.text} is reached over the network and needs a secret: give its "
                f"secret file with {SECRET_OPTIONS}; {MAKE_ONE}"
            )
        self._address, self._keys, self._timeout = address, keys, timeout
        self._context: zmq.Context[Socket] = zmq.Context()
        self._socket = self._new_socket(zmq.REQ)
        # After a timeout the next request may be sent, and a late reply to the old one is not taken for its
        # answer.
        self._socket.setsockopt(zmq.REQ_RELAXED, 1)
        self._socket.setsockopt(zmq.REQ_CORRELATE, 1)
        self._handshake: _Handshake | None = _Handshake(
            self._socket, address, keys is not None, waits_for_listener
        )
        self._socket.connect(address.endpoint)

    def request(self, request: Request, reply_type: type[ReplyT], timeout: float | None = None) -> ReplyT:
        """Ask, and wait for the answer.

        Raises
        ------
        WorkerUnreachable, SecretError, ProtocolMismatch, WorkerRefused
        """
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        # A connection that ended in its handshake leaves nobody to send to.
        self._wait_for(zmq.POLLOUT, deadline, timeout)
        self._socket.send(encode(request), zmq.NOBLOCK)
        self._wait_for(zmq.POLLIN, deadline, timeout)
        self._end_handshake()
        payload = self._socket.recv()
        try:
            reply = decode_reply(payload)
        except msgspec.MsgspecError as error:
            raise ProtocolMismatch(
                f"the answer from {self._address.text} is not of vllm-lamina's protocol {PROTOCOL_VERSION}: {error}; "
                "install the same version on both sides"
            ) from error
        if isinstance(reply, Refused):
            raise WorkerRefused(f"the attention worker at {self._address.text} refused: {reply.reason}")
        if not isinstance(reply, reply_type):
            raise ProtocolMismatch(
                f"the attention worker at {self._address.text} answered {type(request).__name__} with "
                f"{type(reply).__name__}: install the same version of vllm-lamina on both sides"
            )
        return reply

    def _wait_for(self, event: int, deadline: float, timeout: float) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, event)
        if self._handshake:
            poller.register(self._handshake.monitor.socket, zmq.POLLIN)
        while events := dict(poller.poll(max(0, int((deadline - time.monotonic()) * 1000)))):
            if self._socket in events:
                return
            if self._handshake:
                self._handshake.check()
        if self._handshake and self._handshake.something_listens:
            raise self._handshake.failure()
        raise WorkerUnreachable(
            f"no attention worker answered at {self._address.text} within {timeout:g} s; start one with "
            "`vllm-lamina worker`, or correct the address"
        )

    def open_second_socket(self) -> Socket:
        """Open another connection to the worker, for another thread; who asks closes it before `close`."""
        second = self._new_socket(zmq.DEALER)
        second.connect(self._address.endpoint)
        return second

    def _new_socket(self, kind: int) -> Socket:
        new = self._context.socket(kind)
        new.linger = 0
        set_limits(new, self._address, MAX_REPLY_BYTES)
        if self._keys:
            use_client_keys(new, self._keys)
        return new

    def _end_handshake(self) -> None:
        if self._handshake:
            self._handshake.monitor.close()
            self._handshake = None

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._end_handshake()
        self._socket.close(linger=0)
        self._context.term()


class _Handshake:
    """Watches a connection until its first answer: a peer that cannot be talked to shows only here."""

    EVENTS = (
        zmq.Event.CONNECTED
        | zmq.Event.DISCONNECTED
        | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
        | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
        | zmq.Event.HANDSHAKE_FAILED_AUTH
        | zmq.Event.CONNECT_RETRIED
    )

    def __init__(
        self, socket: Socket, address: ControlAddress, has_secret: bool, waits_for_listener: bool
    ) -> None:
        self.monitor = SocketMonitor(socket, self.EVENTS)
        self.something_listens = False
        self._address, self._has_secret = address, has_secret
        self._waits_for_listener = waits_for_listener

    def check(self) -> None:
        """Raise WorkerUnreachable or SecretError if the handshake has failed."""
        while event := self.monitor.next_event():
            kind, value = event
            if kind == zmq.Event.CONNECTED:
                self.something_listens = True
            elif kind == zmq.Event.CONNECT_RETRIED:
                if not self._waits_for_listener and not self.something_listens:
                    raise WorkerUnreachable(f"nobody listens at {self._address.text}")
            elif (
                kind != zmq.Event.HANDSHAKE_FAILED_NO_DETAIL or value != errno.EAGAIN
            ):  # but for ZeroMQ's own limit
                raise self.failure()

    def failure(self) -> WorkerUnreachable | SecretError:
        """Say why: what ZeroMQ reports depends on which side hangs up first, so the peer's greeting is looked at."""
        worker, mechanism = f"the attention worker at {self._address.text}", _mechanism(self._address)
        if mechanism == b"CURVE" and self._has_secret:
            return SecretError(
                f"{worker} has another secret than this side: use the same secret file on both; the worker's log names "
                "the clients it refused"
            )
        if mechanism == b"CURVE":
            return SecretError(
                f"{worker} refuses clients without its secret: give its secret file with {SECRET_OPTIONS}"
            )
        if mechanism == b"NULL" and self._has_secret:
            return SecretError(
                f"{worker} runs without a secret: start it with --secret-file, or give none here"
            )
        return WorkerUnreachable(
            f"no attention worker answered at {self._address.text}: what listens there is another program, or a worker "
            "that is stopped; correct the address, or start a worker with `vllm-lamina worker`"
        )


def _mechanism(address: ControlAddress) -> bytes | None:
    """Return the security mechanism that a ZeroMQ peer announces (ZMTP 3, RFC 23); None if it is no such peer."""
    if address.is_ipc:
        return None
    greeting = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((address.host, address.port), GREETING_SECONDS) as peer,
    ):
        peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03")  # the rest would let it judge, and hang up first
        while len(greeting) < GREETING_BYTES and (part := peer.recv(GREETING_BYTES - len(greeting))):
            greeting += part
    is_zmtp = len(greeting) == GREETING_BYTES and greeting[0] == 0xFF and greeting[9] == 0x7F
    return greeting[12:32].rstrip(b"\0") if is_zmtp else None
