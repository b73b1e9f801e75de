"""The attention worker's process: answers control messages, lets native code serve one engine at a time."""

import argparse
import logging
import os
import secrets
import signal
import socket
import sys

import msgspec
import zmq

import vllm_lamina
from vllm_lamina._native import kv_block_bytes
from vllm_lamina.transport.address import control_endpoint
from vllm_lamina.transport.errors import ConnectionFailed, UnsupportedAddress
from vllm_lamina.transport.messages import (
    PROTOCOL_VERSION,
    BlockBytesReply,
    BlockBytesRequest,
    Configure,
    Configured,
    Goodbye,
    Hello,
    Refused,
    Reply,
    Request,
    Shutdown,
    StatsRequest,
    TraceRequest,
    Welcome,
    WorkerStats,
    decode_request,
    encode,
)
from vllm_lamina.units import format_bytes, format_cpus
from vllm_lamina.worker.engine_session import EngineSession, is_same_user
from vllm_lamina.worker.options import WorkerOptions, add_arguments

logger = logging.getLogger("vllm_lamina.attention_worker")

MAX_PENDING_CONNECTIONS = 8
"""Connections to the data socket that have not shown a token yet; more are turned away."""


class AttentionWorkerProcess:
    """The control thread: sleeps until something happens to one of its sockets, its engine or its parent."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._session: EngineSession | None = None
        self._pending: list[socket.socket] = []
        self._running = True
        self._poller = zmq.Poller()

        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = self._context.socket(zmq.ROUTER)
        self._control.linger = 1000
        try:
            self._control.bind(control_endpoint(options.address))
        except zmq.ZMQError as error:
            raise ConnectionFailed(f"cannot listen on {options.address}: {error.strerror}") from error
        self._data_name = f"vllm-lamina-{os.getpid()}-{secrets.token_hex(8)}"
        self._data = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._data.bind("\0" + self._data_name)
        self._data.listen()
        self._data.setblocking(False)
        self._signals, self._signal_writer = socket.socketpair()
        self._signal_writer.setblocking(False)
        for source in (self._control, self._data, self._signals):
            self._poller.register(source, zmq.POLLIN)
        self._parent_pidfd = self._watch_parent()

    def _watch_parent(self) -> int | None:
        if self._options.parent_pid is None:
            return None
        pidfd = os.pidfd_open(self._options.parent_pid)
        self._poller.register(pidfd, zmq.POLLIN)
        # The parent may have ended, and its pid found another process, before the descriptor was opened.
        if os.getppid() != self._options.parent_pid:
            self._running = False
        return pidfd

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT (unless embedded), the parent's end or a Shutdown."""
        signal.set_wakeup_fd(self._signal_writer.fileno())
        signal.signal(signal.SIGTERM, _leave_to_wakeup_fd)
        # Ctrl-C reaches the whole foreground group; an embedded worker leaves the decision to its parent,
        # which may still finish requests.
        embedded = self._options.parent_pid is not None
        signal.signal(signal.SIGINT, signal.SIG_IGN if embedded else _leave_to_wakeup_fd)
        cpus = f"CPUs {format_cpus(self._options.cpus)}" if self._options.cpus else "not pinned"
        logger.info(
            "listening on %s: %s for KV blocks, %d threads (%s)",
            self._options.address,
            format_bytes(self._options.pool_bytes),
            self._options.num_threads,
            cpus,
        )
        try:
            while self._running:
                self._handle_events()
        finally:
            self._close()

    def _handle_events(self) -> None:
        seconds_to_open = self._session.seconds_to_open() if self._session else None
        timeout = None if seconds_to_open is None else max(0, int(seconds_to_open * 1000) + 1)
        events = dict(self._poller.poll(timeout))
        if self._signals.fileno() in events or self._parent_pidfd in events:
            self._running = False
            return
        if self._session is not None:
            self._check_session(self._session, events)
        if self._control in events:
            self._answer()
        if self._data.fileno() in events:
            self._accept()
        for connection in list(self._pending):
            if connection.fileno() in events:
                self._open_session(connection)

    def _check_session(self, session: EngineSession, events: dict[object, int]) -> None:
        seconds_to_open = session.seconds_to_open()
        if seconds_to_open is not None:
            if seconds_to_open <= 0:
                logger.warning("the engine did not open its data channel in time")
                self._end_session()
        elif session.peer_pidfd in events or (session.data_socket and session.data_socket.fileno() in events):
            # Nothing is ever sent on the data socket after the channel is open, so an event is its end.
            self._end_session()

    def _answer(self) -> None:
        *envelope, payload = self._control.recv_multipart()
        try:
            reply = self._reply(decode_request(payload))
        except msgspec.MsgspecError as error:
            reply = Refused(
                f"the message is not one of protocol {PROTOCOL_VERSION}, which vllm-lamina "
                f"{vllm_lamina.__version__} speaks: {error}"
            )
        self._control.send_multipart([*envelope, encode(reply)])

    def _reply(self, request: Request) -> Reply:
        match request:
            case Hello():
                return Welcome(
                    software_version=vllm_lamina.__version__,
                    protocol_version=PROTOCOL_VERSION,
                    pool_bytes=self._options.pool_bytes,
                    num_threads=self._options.num_threads,
                    cpus=self._options.cpus,
                    pid=os.getpid(),
                    data_socket=self._data_name,
                )
            case StatsRequest():
                if self._session is None:
                    return WorkerStats(connected=False, pool_bytes=self._options.pool_bytes)
                return self._session.stats(self._options.pool_bytes)
            case TraceRequest():
                if self._session is None:
                    return Refused("no engine is connected; send requests to a server that uses this worker")
                return self._session.trace(request.action)
            case BlockBytesRequest():
                try:
                    return BlockBytesReply(kv_block_bytes(request.geometry.to_native()))
                except ValueError as error:
                    return Refused(str(error))
            case Configure():
                return self._configure(request)
            case Shutdown():
                if self._options.parent_pid is None:
                    return Refused("only an embedded worker can be shut down by a message; send it SIGTERM")
                self._running = False
                return Goodbye()

    def _configure(self, request: Configure) -> Configured | Refused:
        if self._session is not None:
            return Refused(
                f"it serves another engine (pid {self._session.peer_pid or 'unknown'}); "
                "stop that one, or start another attention worker on another port"
            )
        try:
            needed = request.num_blocks * kv_block_bytes(request.geometry.to_native())
            if needed > self._options.pool_bytes:
                return Refused(
                    f"{request.num_blocks} KV blocks take {format_bytes(needed)}, more than the worker's "
                    f"{format_bytes(self._options.pool_bytes)}; raise its memory or ask for fewer blocks"
                )
            self._session = EngineSession(request, self._options.num_threads, self._options.cpus)
        except (ValueError, MemoryError) as error:
            return Refused(str(error) or "the system refuses the pool's memory")
        return Configured(self._session.used_bytes, self._session.token, self._session.isa)

    def _accept(self) -> None:
        try:
            connection, _ = self._data.accept()
        except BlockingIOError:
            return
        connection.setblocking(False)
        if len(self._pending) >= MAX_PENDING_CONNECTIONS or not is_same_user(connection):
            connection.close()
            return
        self._pending.append(connection)
        self._poller.register(connection, zmq.POLLIN)

    def _open_session(self, connection: socket.socket) -> None:
        self._pending.remove(connection)
        self._poller.unregister(connection)
        session = self._session
        if session is None or not session.open(connection):
            logger.warning("a connection to the data socket was turned away: wrong token or no channel")
            connection.close()
            return
        self._poller.register(connection, zmq.POLLIN)
        if session.peer_pidfd is not None:
            self._poller.register(session.peer_pidfd, zmq.POLLIN)
        logger.info(
            "engine connected (pid %d): %d KV blocks, %s, kernel %s",
            session.peer_pid,
            session.num_blocks,
            format_bytes(session.used_bytes),
            session.isa,
        )

    def _end_session(self) -> None:
        session = self._session
        if session is None:
            return
        if session.data_socket is not None:
            self._poller.unregister(session.data_socket)
            logger.info("engine left (pid %d), its KV blocks are dropped", session.peer_pid)
        if session.peer_pidfd is not None:
            self._poller.unregister(session.peer_pidfd)
        self._session = None
        session.close()

    def _close(self) -> None:
        self._end_session()
        for connection in self._pending:
            connection.close()
        self._data.close()
        self._control.close()
        self._context.term()
        signal.set_wakeup_fd(-1)
        self._signals.close()
        self._signal_writer.close()
        if self._parent_pidfd is not None:
            os.close(self._parent_pidfd)


def _leave_to_wakeup_fd(signum: int, frame: object) -> None:
    """Do nothing: Python writes the signal to the wake-up descriptor, which the control thread polls."""


def serve(arguments: argparse.Namespace) -> int:
    """Run an attention worker with parsed options; returns the exit status."""
    try:
        options = WorkerOptions.parse(arguments)
        _stay_on(options.cpus)
    except (UnsupportedAddress, ValueError) as error:
        print(f"vllm-lamina worker: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        format=f"{options.log_prefix}%(levelname)s %(asctime)s attention worker: %(message)s",
        datefmt="%m-%d %H:%M:%S",
        level=logging.INFO,
    )
    try:
        AttentionWorkerProcess(options).run()
    except ConnectionFailed as error:
        print(f"vllm-lamina worker: {error}", file=sys.stderr)
        return 1
    return 0


def _stay_on(cpus: list[int]) -> None:
    """Keep all threads, the control thread too, on the worker's share of the machine."""
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise ValueError(f"--cpus: this process may not run on CPUs {format_cpus(cpus)}") from error
    # The system silently leaves out those of several CPUs that it does not grant.
    refused = set(cpus) - os.sched_getaffinity(0)
    if refused:
        raise ValueError(f"--cpus: this process may not run on CPUs {format_cpus(refused)}")


def main(argv: list[str] | None = None) -> int:
    """Run an attention worker from a command line."""
    parser = argparse.ArgumentParser(prog="python -m vllm_lamina.worker.attention_worker")
    add_arguments(parser)
    return serve(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
