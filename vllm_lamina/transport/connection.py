"""The model worker's end of an attention worker: control connection, data channel, and how both are opened."""

import contextlib
import logging
import os
import platform
import secrets
import socket
import threading
import time
from types import TracebackType

import vllm_lamina
from vllm_lamina._native import Channel, ChannelError, ShmChannel, ShmEnd, create_shm_memory
from vllm_lamina.config import TransportOption
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.address import ControlAddress
from vllm_lamina.transport.control_client import ControlClient
from vllm_lamina.transport.errors import ConnectionFailed, ProtocolMismatch, WorkerRefused, WorkerUnreachable
from vllm_lamina.transport.heartbeat import HeartbeatThread
from vllm_lamina.transport.host_identity import host_identity
from vllm_lamina.transport.secret import ControlKeys
from vllm_lamina.transport.ucx import (
    TOKEN_BYTES,
    describe_ucx,
    load_ucx,
    network_of,
    new_channel,
    what_to_check,
)
from vllm_lamina.wire.messages import (
    PROTOCOL_VERSION,
    BlockBytesReply,
    BlockBytesRequest,
    Configure,
    Configured,
    Goodbye,
    Hello,
    Leave,
    Network,
    OpenUcx,
    StatsRequest,
    Trace,
    TraceRequest,
    Transport,
    UcxOpened,
    Welcome,
    WorkerStats,
)

logger = logging.getLogger("vllm.lamina")

DEFAULT_RING_BYTES = 1 << 30

DATA_CHANNEL_OPEN = b"\x01"
"""What the worker sends on the data socket once it serves the channel."""

LOCAL_HEARTBEAT_TIMEOUT, REMOTE_HEARTBEAT_TIMEOUT = 1.0, 3.0
"""Seconds without an answer after which a worker on this host, or another, is lost, unless told otherwise."""

DATA_SOCKET_SECONDS, DATA_SOCKET_RETRY_SECONDS = 8.0, 0.1
"""For how long, and how often, a shared-memory channel is offered to a worker that turns it away."""

LEAVE_SECONDS = 2.0
"""How long `close` waits for the worker to drop the pool."""


class AttentionWorkerConnection:
    """A connection to one attention worker. Not thread-safe, but for `channel`, `alive` and `lost_reason`.

    From `configure` to `close` a thread sends heartbeats, idle or not, which renew the engine's lease, and closes the
    channel when the worker is lost, so that every wait on it ends.

    Examples
    --------
    >>> with AttentionWorkerConnection.connect("10.0.0.7:7100", secret_file="/etc/lamina/secret") as worker:
    ...     num_blocks = worker.pool_bytes // worker.block_bytes(geometry)
    ...     worker.configure(geometry, num_blocks)
    ...     partition = Partition.by_heads(geometry.to_native(), [[geometry.caches[0].num_kv_heads]])
    ...     AttentionClient([worker.channel], partition).begin_step(...)
    """

    def __init__(
        self,
        address: str,
        timeout: float = 10.0,
        secret_file: str | os.PathLike[str] = "",
        waits_for_listener: bool = True,
    ) -> None:
        self.address = address
        self._timeout = timeout
        self._channel: Channel | None = None
        self._heartbeat: HeartbeatThread | None = None
        self._token = b""
        self._lock = threading.Lock()  # guards the channel against a loss that is noticed while it is opened
        self.lost_reason = ""
        """Why the worker is lost; empty as long as it is not."""
        keys = ControlKeys.from_file(secret_file) if secret_file else None
        self._address = ControlAddress.parse(address)
        self._control = ControlClient(self._address, keys, timeout, waits_for_listener)
        try:
            self.welcome = self._control.request(Hello(vllm_lamina.__version__, PROTOCOL_VERSION), Welcome)
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
    def connect(
        cls,
        address: str,
        timeout: float = 10.0,
        *,
        secret_file: str | os.PathLike[str] = "",
        waits_for_listener: bool = True,
    ) -> "AttentionWorkerConnection":
        """Open the control connection and greet the worker.

        Parameters
        ----------
        address
            See `ControlAddress.parse`.
        timeout
            Seconds to wait for each answer of the worker.
        secret_file
            The worker's secret; needed where the address is not one of this host's loopback.
        waits_for_listener
            Whether a port that nobody listens on may be opened yet; if not, that is an error at once.

        Raises
        ------
        UnsupportedAddress, SecretError, WorkerUnreachable, WorkerRefused, ProtocolMismatch
        """
        return cls(address, timeout, secret_file, waits_for_listener)

    @property
    def pool_bytes(self) -> int:
        """Memory the worker offers for KV blocks."""
        return self.welcome.pool_bytes

    @property
    def alive(self) -> bool:
        """False once the worker is known to be lost; its channel is closed then."""
        return not self.lost_reason

    @property
    def channel(self) -> Channel:
        """The data channel; there after `configure`."""
        if self._channel is None:
            raise RuntimeError("the attention worker is not configured")
        return self._channel

    def block_bytes(self, geometry: Geometry) -> int:
        """Ask how many bytes of the pool one KV block takes over all layers.

        Raises
        ------
        WorkerRefused
            No kernel supports the geometry.
        """
        return self._control.request(BlockBytesRequest(geometry), BlockBytesReply).num_bytes

    def check_available(self, transport: TransportOption = "auto") -> None:
        """Check what `configure` would refuse, before a model is loaded for it.

        Raises
        ------
        WorkerRefused
            It serves another engine, it is about to end, or shared memory does not reach it.
        UcxUnavailable
            UCX would be used and is not installed.
        """
        if self.welcome.draining:
            raise WorkerRefused(
                f"the attention worker at {self.address} is about to end; use another one, or start it again"
            )
        if self.welcome.engine:
            raise WorkerRefused(f"the attention worker at {self.address} {busy_with(self.welcome.engine)}")
        self._choose_transport(transport)

    def configure(
        self,
        geometry: Geometry,
        num_blocks: int,
        *,
        ring_bytes: int = DEFAULT_RING_BYTES,
        spin_us: int = 100,
        worker_spin_us: int = 100,
        transport: TransportOption = "auto",
        heartbeat_timeout: float = 0.0,
        replaces: bytes = b"",
    ) -> int:
        """Let the worker allocate its pool, and open the data channel.

        Parameters
        ----------
        ring_bytes
            Capacity of the channel in each direction; pages are taken as they are touched. The largest frame
            is one layer's q, k and v of a whole step.
        spin_us, worker_spin_us
            How long this side and the worker poll before they sleep; 0 where threads outnumber CPUs.
        transport
            Of the data channel: "shm" (same host only), "ucx", or "auto" for the first of them that reaches it.
        heartbeat_timeout
            Seconds without a sign of life after which the worker is lost; 0 for the default of where it is.
        replaces
            `token` of an earlier connection to the same worker, whose pool is dropped if it is still there.

        Returns
        -------
        int
            Bytes of the pool in use.

        Raises
        ------
        WorkerRefused
            The worker serves another engine, the pool is too small, or shared memory does not reach it.
        UcxUnavailable
            UCX would be used and is not installed, or has no device on the network of the worker.
        """
        chosen = self._choose_transport(transport)
        engine = f"pid {os.getpid()} on {platform.node()}"
        host = self._address.host if chosen == "ucx" else ""
        configured = self._control.request(
            Configure(geometry, num_blocks, worker_spin_us, chosen, host, engine, replaces), Configured
        )
        default = LOCAL_HEARTBEAT_TIMEOUT if self._is_on_this_host else REMOTE_HEARTBEAT_TIMEOUT
        self._keep_lease(configured.token, heartbeat_timeout or default)
        if configured.network is None:
            channel = self._open_shm_channel(configured.token, ring_bytes, spin_us)
        else:
            channel = self._open_ucx_channel(configured.token, configured.network, ring_bytes, spin_us)
        with self._lock:
            self._channel = channel
            if not self.alive:
                channel.close()
        return configured.used_bytes

    def _choose_transport(self, transport: TransportOption) -> Transport:
        same_user = os.getuid() in (0, self.welcome.uid)
        reaches = self._is_on_this_host and same_user
        if transport == "shm" and not reaches:
            raise WorkerRefused(
                f"the attention worker at {self.address} cannot be reached by shared memory: it runs on another "
                "host, in another network namespace, or as another user; use transport auto or ucx"
            )
        if transport == "ucx" or not reaches:
            load_ucx()
            return "ucx"
        return "shm"

    @property
    def _is_on_this_host(self) -> bool:
        return self._address.is_ipc or self.welcome.host == host_identity() != ""

    @property
    def token(self) -> bytes:
        """Names the engine to the worker; empty before `configure`."""
        return self._token

    def _keep_lease(self, token: bytes, timeout: float) -> None:
        self._token = token
        self._heartbeat = HeartbeatThread(
            self._control.open_second_socket(),
            token,
            self.welcome.lease_seconds,
            timeout,
            self.welcome.pid if self._is_on_this_host else None,
            self._on_lost,
            self._on_draining,
        )

    def _on_lost(self, reason: str) -> None:
        with self._lock:
            self.lost_reason = f"the attention worker at {self.address} is lost: {reason}"
            if self._channel is not None:
                self._channel.close()
        logger.error("Lamina: %s.", self.lost_reason)

    def _on_draining(self) -> None:
        logger.warning("Lamina: the attention worker at %s is asked to end and waits for us.", self.address)

    def _open_shm_channel(self, token: bytes, ring_bytes: int, spin_us: int) -> Channel:
        memory_fd = create_shm_memory(ring_bytes)
        try:
            with self._open_data_socket(token, memory_fd) as data_socket:
                return ShmChannel(memory_fd, data_socket.fileno(), ShmEnd.CLIENT, spin_us)
        finally:
            os.close(memory_fd)

    def _open_ucx_channel(self, token: bytes, there: Network, ring_bytes: int, spin_us: int) -> Channel:
        info = load_ucx()
        channel_token = secrets.token_bytes(TOKEN_BYTES)
        try:
            here = network_of(self._address.local_host())
        except OSError as error:
            raise WorkerUnreachable(
                f"there is no way to the attention worker at {self.address} any more ({error})"
            ) from error
        try:
            channel = new_channel(channel_token, ring_bytes, spin_us, here, there)
            opened = self._control.request(
                OpenUcx(token, channel_token, ring_bytes, channel.address, here), UcxOpened
            )
            channel.connect(opened.address)
            channel.wait_connected(self._timeout)
        except (ChannelError, WorkerRefused, WorkerUnreachable) as error:
            raise (WorkerRefused if isinstance(error, WorkerRefused) else WorkerUnreachable)(
                f"the data channel to the attention worker at {self.address} could not be opened over UCX ({error}): "
                f"{what_to_check(here, there)}"
            ) from error
        logger.info("Lamina: attention worker at %s: %s.", self.address, describe_ucx(info, channel))
        return channel

    def _open_data_socket(self, token: bytes, memory_fd: int) -> socket.socket:
        """Hand the channel's memory over; the socket then stays open as the sign of life of both sides.

        Again and again for some seconds: strangers may hold all descriptors that the worker may open, until the time
        of their handshakes is up.
        """
        end = time.monotonic() + DATA_SOCKET_SECONDS
        while True:
            data_socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._try_data_socket(data_socket, token, memory_fd)
                return data_socket
            except WorkerRefused:
                data_socket.close()
                if time.monotonic() > end:
                    raise
                time.sleep(DATA_SOCKET_RETRY_SECONDS)
            except BaseException:
                data_socket.close()
                raise

    def _try_data_socket(self, data_socket: socket.socket, token: bytes, memory_fd: int) -> None:
        data_socket.settimeout(self._timeout)
        try:
            data_socket.connect("\0" + self.welcome.data_socket)
            socket.send_fds(data_socket, [token], [memory_fd])
            answer = data_socket.recv(1)
        except ConnectionResetError:  # it was closed before what was sent had been read
            answer = b""
        except OSError as error:
            raise WorkerUnreachable(
                f"the data channel to the attention worker at {self.address} could not be opened ({error}); see its log"
            ) from error
        if answer != DATA_CHANNEL_OPEN:
            raise WorkerRefused(
                f"the attention worker at {self.address} refused the data channel; see its log"
            )

    def stats(self) -> WorkerStats:
        """Ask the worker for its counters."""
        return self._control.request(StatsRequest(), WorkerStats)

    def trace(self, seconds: float) -> bytes:
        """Record the frames of ``seconds`` (see ``take_trace``). Raises WorkerRefused without an engine."""
        self._control.request(TraceRequest("start"), Trace)
        time.sleep(seconds)
        return self._control.request(TraceRequest("take"), Trace).events

    def close(self) -> None:
        """Leave the worker, which drops its pool and waits for the next engine. May be called twice."""
        configured = self._heartbeat is not None
        self._stop()
        if configured and self.alive:
            with contextlib.suppress(ConnectionFailed):
                self._control.request(Leave(self._token), Goodbye, min(LEAVE_SECONDS, self._timeout))
        self._control.close()

    def abandon(self) -> None:
        """Close this end without a word to the worker, which is lost. May be called twice."""
        self._stop()
        self._control.close()

    def _stop(self) -> None:
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            heartbeat.stop()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def __enter__(self) -> "AttentionWorkerConnection":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def busy_with(engine: str) -> str:
    """What a worker that serves another engine is called, and what to do."""
    return (
        f"serves another engine ({engine}); stop that one, or start another attention worker (an engine that died is "
        "forgotten when its lease runs out)"
    )
