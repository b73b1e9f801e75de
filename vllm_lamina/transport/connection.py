"""The model worker's end of an attention worker: control socket, data channel, and how both are opened."""

import os
import socket
import time
from types import TracebackType
from typing import TypeVar

import msgspec
import zmq

import vllm_lamina
from vllm_lamina._native import AttentionClient, create_shm_memory
from vllm_lamina.transport.address import control_endpoint
from vllm_lamina.transport.errors import ConnectionFailed, ProtocolMismatch, WorkerRefused, WorkerUnreachable
from vllm_lamina.transport.messages import (
    PROTOCOL_VERSION,
    BlockBytesReply,
    BlockBytesRequest,
    Configure,
    Configured,
    Geometry,
    Goodbye,
    Hello,
    Refused,
    Request,
    Shutdown,
    StatsRequest,
    Trace,
    TraceRequest,
    Welcome,
    WorkerStats,
    decode_reply,
    encode,
)

DEFAULT_RING_BYTES = 1 << 30

DATA_CHANNEL_OPEN = b"\x01"
"""What the worker sends on the data socket once it serves the channel."""

ReplyT = TypeVar("ReplyT", Welcome, BlockBytesReply, Configured, WorkerStats, Trace, Goodbye)


class AttentionWorkerConnection:
    """A connection to one attention worker. Not thread-safe, but for `client`.

    Examples
    --------
    >>> with AttentionWorkerConnection.connect("127.0.0.1:7100") as worker:
    ...     num_blocks = worker.pool_bytes // worker.block_bytes(geometry)
    ...     worker.configure(geometry, num_blocks)
    ...     worker.client.begin_step(...)
    """

    def __init__(self, address: str, timeout: float = 10.0) -> None:
        self.address = address
        self._timeout = timeout
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        # After a timeout the next request may be sent, and a late reply to the old one is not taken for its
        # answer.
        self._socket.setsockopt(zmq.REQ_RELAXED, 1)
        self._socket.setsockopt(zmq.REQ_CORRELATE, 1)
        self._client: AttentionClient | None = None
        try:
            self._socket.connect(control_endpoint(address))
            self.welcome = self._request(Hello(vllm_lamina.__version__, PROTOCOL_VERSION), Welcome)
            if self.welcome.protocol_version != PROTOCOL_VERSION:
                raise ProtocolMismatch(
                    f"the attention worker at {address} runs vllm-lamina {self.welcome.software_version} "
                    f"(protocol {self.welcome.protocol_version}), this side {vllm_lamina.__version__} "
                    f"(protocol {PROTOCOL_VERSION}): install the same version on both"
                )
        except ConnectionFailed:
            self.close()
            raise

    @classmethod
    def connect(cls, address: str, timeout: float = 10.0) -> "AttentionWorkerConnection":
        """Open the control socket and greet the worker.

        Parameters
        ----------
        address
            ``HOST:PORT`` or ``tcp://HOST:PORT`` on loopback, or ``ipc://@NAME``.
        timeout
            Seconds to wait for each answer of the worker.

        Raises
        ------
        UnsupportedAddress, WorkerUnreachable, ProtocolMismatch
        """
        return cls(address, timeout)

    @property
    def pool_bytes(self) -> int:
        """Memory the worker offers for KV blocks."""
        return self.welcome.pool_bytes

    @property
    def client(self) -> AttentionClient:
        """The native client of the data channel; there after `configure`."""
        if self._client is None:
            raise RuntimeError("the attention worker is not configured")
        return self._client

    def block_bytes(self, geometry: Geometry) -> int:
        """Ask how many bytes of the pool one KV block takes over all layers.

        Raises
        ------
        WorkerRefused
            No kernel supports the geometry.
        """
        return self._request(BlockBytesRequest(geometry), BlockBytesReply).num_bytes

    def configure(
        self,
        geometry: Geometry,
        num_blocks: int,
        *,
        ring_bytes: int = DEFAULT_RING_BYTES,
        spin_us: int = 100,
        worker_spin_us: int = 100,
    ) -> int:
        """Let the worker allocate its pool, and open the data channel.

        Parameters
        ----------
        ring_bytes
            Capacity of the channel in each direction; pages are taken as they are touched. The largest frame
            is one layer's q, k and v of a whole step.
        spin_us, worker_spin_us
            How long this side and the worker poll before they sleep; 0 where threads outnumber CPUs.

        Returns
        -------
        int
            Bytes of the pool in use.

        Raises
        ------
        WorkerRefused
            The worker serves another engine, or the pool is too small.
        """
        configured = self._request(Configure(geometry, num_blocks, worker_spin_us), Configured)
        memory_fd = create_shm_memory(ring_bytes)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as data_socket:
                self._open_data_channel(data_socket, configured.token, memory_fd)
                self._client = AttentionClient(geometry.to_native(), memory_fd, data_socket.fileno(), spin_us)
        finally:
            os.close(memory_fd)
        return configured.used_bytes

    def _open_data_channel(self, data_socket: socket.socket, token: bytes, memory_fd: int) -> None:
        """Hand the channel's memory over; the socket then stays open as the sign of life of both sides."""
        data_socket.settimeout(self._timeout)
        try:
            data_socket.connect("\0" + self.welcome.data_socket)
            socket.send_fds(data_socket, [token], [memory_fd])
            answer = data_socket.recv(1)
        except OSError as error:
            raise WorkerUnreachable(
                f"the data channel to the attention worker at {self.address} could not be opened ({error}); "
                "is the worker on this host and in the same network namespace?"
            ) from error
        if answer != DATA_CHANNEL_OPEN:
            raise WorkerRefused(
                f"the attention worker at {self.address} refused the data channel; see its log"
            )

    def stats(self) -> WorkerStats:
        """Ask the worker for its counters."""
        return self._request(StatsRequest(), WorkerStats)

    def trace(self, seconds: float) -> bytes:
        """Record the frames of ``seconds`` (see ``take_trace``). Raises WorkerRefused without an engine."""
        self._request(TraceRequest("start"), Trace)
        time.sleep(seconds)
        return self._request(TraceRequest("take"), Trace).events

    def shutdown(self) -> None:
        """Ask an embedded worker to end. Raises WorkerRefused if it is not an embedded one."""
        self._request(Shutdown(), Goodbye)

    def close(self) -> None:
        """Leave the worker, which drops its pool and waits for the next engine. May be called twice."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self._socket.close(linger=0)
        self._context.term()

    def _request(self, request: Request, reply_type: type[ReplyT]) -> ReplyT:
        self._socket.send(encode(request))
        if not self._socket.poll(int(self._timeout * 1000)):
            raise WorkerUnreachable(
                f"no attention worker answered at {self.address} within {self._timeout:g} s; start one with "
                "`vllm-lamina worker`, or correct the address"
            )
        try:
            reply = decode_reply(self._socket.recv())
        except msgspec.MsgspecError as error:
            raise ProtocolMismatch(
                f"the answer from {self.address} is not of vllm-lamina's protocol {PROTOCOL_VERSION}: {error}"
            ) from error
        if isinstance(reply, Refused):
            raise WorkerRefused(f"the attention worker at {self.address} refused: {reply.reason}")
        if not isinstance(reply, reply_type):
            raise ProtocolMismatch(
                f"the attention worker at {self.address} answered {type(request).__name__} with "
                f"{type(reply).__name__}: install the same version of vllm-lamina on both sides"
            )
        return reply

    def __enter__(self) -> "AttentionWorkerConnection":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
