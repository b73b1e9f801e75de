"""The attention worker's process: answers control messages, lets native code serve one engine at a time."""

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import time

import msgspec
import zmq

import vllm_lamina
from vllm_lamina._native import ChannelError
from vllm_lamina.host import memory_for_pool
from vllm_lamina.transport.connection import busy_with
from vllm_lamina.transport.errors import ConnectionFailed
from vllm_lamina.transport.host_identity import host_identity
from vllm_lamina.transport.listener import ControlListener
from vllm_lamina.transport.ucx import describe_ucx, load_ucx
from vllm_lamina.units import format_bytes, format_cpus
from vllm_lamina.wire.messages import (
    PROTOCOL_VERSION,
    BlockBytesReply,
    BlockBytesRequest,
    Configure,
    Configured,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Leave,
    OpenUcx,
    Refused,
    Reply,
    Request,
    StatsRequest,
    TraceRequest,
    UcxOpened,
    Welcome,
    WorkerStats,
    decode_request,
    encode,
)
from vllm_lamina.worker.attention_worker.descriptors import SpareDescriptors, limit_descriptors, max_clients
from vllm_lamina.worker.attention_worker.engine_session import EngineSession, is_same_user
from vllm_lamina.worker.attention_worker.options import WorkerOptions, add_arguments

logger = logging.getLogger("vllm_lamina.attention_worker")

MAX_PENDING_CONNECTIONS = 8
"""Connections to the data socket that have not shown a token yet; one more, and the oldest is turned away."""

PEER_CHECK_SECONDS = 1.0
"""How often an engine is looked at whose end wakes nobody."""

MAX_REQUESTS_AT_ONCE = 1000
"""Before this thread looks at its signals and its engine again. ZeroMQ takes one of each client in turn."""


class AttentionWorkerProcess:
    """The control thread: sleeps until something happens to one of its sockets, its engine or its parent.

    Raises
    ------
    ConnectionFailed
        The address needs a secret, or cannot be listened on.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._session: EngineSession | None = None
        self._pending: list[socket.socket] = []
        self._spare = SpareDescriptors()
        self._running = True
        self._drain_until: float | None = None
        self._poller = zmq.Poller()
        # Other hosts need UCX: better no worker than one that only its own host can use.
        self._ucx = describe_ucx(load_ucx()) if options.address.needs_secret else ""
        self._listener = ControlListener(options.address, options.keys, max_clients())
        self._data_name = f"vllm-lamina-{os.getpid()}-{secrets.token_hex(8)}"
        self._data = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._data.bind("\0" + self._data_name)
        self._data.listen()
        self._data.setblocking(False)
        self._signals, self._signal_writer = socket.socketpair()
        self._signal_writer.setblocking(False)
        for source in (*self._listener.sockets, self._data, self._signals):
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
        """Serve until SIGTERM or SIGINT (SIGTERM alone if embedded), or the parent's end.

        A first signal lets the engine that is connected finish, for the time of `WorkerOptions.drain_seconds`; a second
        one ends at once.
        """
        signal.set_wakeup_fd(self._signal_writer.fileno())
        signal.signal(signal.SIGTERM, _leave_to_wakeup_fd)
        # Ctrl-C reaches the whole foreground group; an embedded worker leaves the decision to its parent,
        # which may still finish requests.
        embedded = self._options.parent_pid is not None
        signal.signal(signal.SIGINT, signal.SIG_IGN if embedded else _leave_to_wakeup_fd)
        cpus = f"CPUs {format_cpus(self._options.cpus)}" if self._options.cpus else "not pinned"
        logger.info(
            "listening on %s (%s): %s for KV blocks, %d threads (%s)",
            self._options.address.text,
            "encrypted, with a secret" if self._options.keys else "this host only, without a secret",
            format_bytes(self._options.pool_bytes),
            self._options.num_threads,
            cpus,
        )
        if self._ucx:
            logger.info("other hosts are served over %s", self._ucx)
        try:
            while self._running:
                self._handle_events()
        finally:
            self._close()

    def _handle_events(self) -> None:
        events = dict(self._poller.poll(self._milliseconds_to_wait()))
        if self._parent_pidfd in events:
            self._running = False
            return
        if self._signals.fileno() in events:
            self._take_signals()
        self._listener.admit()
        # Before the deadlines: a heartbeat that is here has come in time, whatever kept this thread.
        for _ in range(MAX_REQUESTS_AT_ONCE):
            if not self._running or not self._listener.control.poll(0):
                break
            self._answer()
        self._end_session_if_over()
        if self._data.fileno() in events:
            self._accept()
        for connection in list(self._pending):
            if connection.fileno() in events:
                self._open_session(connection)
        if self._drain_until is not None and (self._session is None or self._drain_until <= time.monotonic()):
            self._running = False

    def _milliseconds_to_wait(self) -> int | None:
        deadlines = [self._drain_until]
        if self._session is not None:
            deadlines.append(self._session.deadline)
            if not self._session.wakes_control_thread:
                deadlines.append(time.monotonic() + PEER_CHECK_SECONDS)
        times = [deadline - time.monotonic() for deadline in deadlines if deadline is not None]
        return max(0, int(min(times) * 1000) + 1) if times else None

    def _take_signals(self) -> None:
        for _ in self._signals.recv(64):
            if self._drain_until is not None or self._session is None or not self._options.drain_seconds:
                self._running = False
                return
            self._drain_until = time.monotonic() + self._options.drain_seconds
            logger.info(
                "draining: no new engine is taken; the connected one (%s) has %g s to leave; signal again to end now",
                self._session.engine,
                self._options.drain_seconds,
            )

    def _end_session_if_over(self) -> None:
        if self._session is None:
            return
        deadline = self._session.deadline
        if self._session.peer_has_gone():
            self._end_session("left")
        elif deadline is not None and deadline <= time.monotonic():
            self._end_session(self._session.overdue)

    def _answer(self) -> None:
        envelope, payload = self._listener.receive()
        try:
            reply = self._reply(decode_request(payload))
        except msgspec.MsgspecError as error:
            reply = Refused(
                f"the message is not one of protocol {PROTOCOL_VERSION}, which vllm-lamina "
                f"{vllm_lamina.__version__} speaks: {error}"
            )
        self._listener.answer(envelope, encode(reply))

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
                    host=host_identity(),
                    uid=os.getuid(),
                    lease_seconds=self._options.lease_seconds,
                    engine=self._session.engine if self._session else "",
                    draining=self._drain_until is not None,
                )
            case Heartbeat():
                if self._session is None or not self._session.is_of(request.token):
                    return Refused("it does not hold this engine's KV blocks any more; see its log")
                self._session.renew()
                return HeartbeatReply(draining=self._drain_until is not None, progress=self._session.progress)
            case Leave():
                if self._session is not None and self._session.is_of(request.token):
                    self._end_session("left")
                return Goodbye()
            case StatsRequest():
                refused = self._listener.refused_clients
                if self._session is None:
                    return WorkerStats(
                        connected=False, pool_bytes=self._options.pool_bytes, refused_clients=refused
                    )
                return self._session.stats(self._options.pool_bytes, refused)
            case TraceRequest():
                if self._session is None:
                    return Refused("no engine is connected; send requests to a server that uses this worker")
                return self._session.trace(request.action)
            case BlockBytesRequest():
                try:
                    return BlockBytesReply(request.geometry.block_bytes())
                except ValueError as error:
                    return Refused(str(error))
            case Configure():
                with self._spare.released():
                    return self._configure(request)
            case OpenUcx():
                return self._open_ucx(request)

    def _configure(self, request: Configure) -> Configured | Refused:
        self._end_session_if_over()
        if self._session is not None and self._session.is_of(request.replaces):
            self._end_session("begins anew")
        if self._session is not None:
            return Refused(f"it {busy_with(self._session.engine)}")
        if self._drain_until is not None:
            return Refused("it is about to end; use another one, or start it again")
        try:
            needed = request.num_blocks * request.geometry.block_bytes()
            if needed > self._options.pool_bytes:
                return Refused(
                    f"{request.num_blocks} KV blocks take {format_bytes(needed)}, more than the worker's "
                    f"{format_bytes(self._options.pool_bytes)}; raise its memory or ask for fewer blocks"
                )
            # What was free when the worker started may be taken by now.
            if needed > (free := memory_for_pool()):
                return Refused(
                    f"{request.num_blocks} KV blocks take {format_bytes(needed)}, and its host, or the cgroup around "
                    f"it, can hold {format_bytes(free)} now; free memory there, or ask for fewer blocks"
                )
            self._session = EngineSession(
                request,
                self._options.num_threads,
                self._options.cpus,
                lease_seconds=self._options.lease_seconds,
            )
        except (ConnectionFailed, ValueError, MemoryError) as error:
            return Refused(str(error) or "the system refuses the pool's memory")
        except RuntimeError as error:  # a thread that the system refuses
            return Refused(f"the system refuses the kernel's threads: {error}; raise ulimit -u")
        session = self._session
        return Configured(session.used_bytes, session.token, session.isa, session.network)

    def _open_ucx(self, request: OpenUcx) -> UcxOpened | Refused:
        if self._session is None or not self._session.is_of(request.token):
            return Refused("the engine did not open its data channel in time")
        try:
            with self._spare.released():
                opened, description = self._session.open_ucx(request)
        # RuntimeError: what the system refuses, descriptors and memory say.
        except (ConnectionFailed, ChannelError, ValueError, RuntimeError, MemoryError) as error:
            return Refused(str(error) or "the system refuses the channel's memory")
        self._log_connected(self._session, description)
        return opened

    def _log_connected(self, session: EngineSession, transport: str) -> None:
        logger.info(
            "engine connected (%s): %d KV blocks, %s, kernel %s; %s",
            session.engine,
            session.num_blocks,
            format_bytes(session.used_bytes),
            session.isa,
            transport,
        )

    def _accept(self) -> None:
        try:
            with self._spare.released():
                connection, _ = self._data.accept()
        except OSError:  # nobody is there any more, or no descriptor for it
            return
        connection.setblocking(False)
        if not is_same_user(connection):
            connection.close()
            return
        # An engine sends its token as soon as it is connected, so the oldest one is no engine.
        if len(self._pending) >= MAX_PENDING_CONNECTIONS:
            self._poller.unregister(self._pending[0])
            self._pending.pop(0).close()
        self._pending.append(connection)
        self._poller.register(connection, zmq.POLLIN)

    def _open_session(self, connection: socket.socket) -> None:
        self._pending.remove(connection)
        self._poller.unregister(connection)
        session = self._session
        with self._spare.released():
            opened = session is not None and session.open(connection)
        if session is None or not opened:
            logger.warning("a connection to the data socket was turned away: wrong token or no channel")
            connection.close()
            return
        self._poller.register(connection, zmq.POLLIN)
        if session.peer_pidfd is not None:
            self._poller.register(session.peer_pidfd, zmq.POLLIN)
        self._log_connected(session, "shared memory")

    def _end_session(self, why: str) -> None:
        session = self._session
        if session is None:
            return
        if session.data_socket is not None:
            self._poller.unregister(session.data_socket)
        if session.peer_pidfd is not None:
            self._poller.unregister(session.peer_pidfd)
        self._session = None
        session.close()
        logger.info("engine %s (%s), its KV blocks are dropped", why, session.engine)

    def _close(self) -> None:
        self._end_session("was left alone: this worker ends")
        for connection in self._pending:
            connection.close()
        self._spare.close()
        self._data.close()
        self._listener.close()
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
        limit_descriptors()
    except ValueError as error:
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
