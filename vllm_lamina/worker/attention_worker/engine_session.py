"""One engine's time at an attention worker: its pool, its data channel, its counters."""

import hmac
import os
import secrets
import select
import socket
import struct
import time

from vllm_lamina._native import (
    AttentionWorker,
    Channel,
    ChannelError,
    ShmChannel,
    ShmEnd,
)
from vllm_lamina.transport.connection import DATA_CHANNEL_OPEN
from vllm_lamina.transport.ucx import describe_ucx, load_ucx, network_of, new_channel
from vllm_lamina.wire.messages import Configure, OpenUcx, Trace, UcxOpened, WorkerStats

OPEN_DEADLINE_SECONDS = 10.0
"""How long a configured pool waits for its data channel before another engine may have the worker."""

MIN_UCX_ADDRESS_BYTES = 16
UCX_ADDRESS_VERSIONS = (0, 1)
"""Low half of a UCX address's first byte: UCP_OBJECT_VERSION_V1 and _V2."""


class EngineSession:
    """The pool of one engine and, once the engine opened it, the data channel.

    Parameters
    ----------
    lease_seconds
        How long the pool outlives the last `renew`; 0 for ever.

    Raises
    ------
    ValueError
        No kernel supports the geometry.
    MemoryError
        The system refuses the pool's memory.
    RuntimeError
        The system refuses the kernel's threads.
    UcxUnavailable
        No network interface has the address at which the engine reaches this host.
    """

    def __init__(
        self,
        request: Configure,
        num_threads: int,
        cpus: list[int],
        *,
        lease_seconds: float = 0.0,
    ) -> None:
        self.engine = request.engine
        self.token = secrets.token_bytes(32)
        self.num_blocks = request.num_blocks
        self._spin_us = request.spin_us
        self.network = network_of(request.host) if request.transport == "ucx" else None
        self._worker = AttentionWorker(
            request.geometry.to_native(), request.num_blocks, num_threads, cpus, request.spin_us
        )
        self._lease_seconds = lease_seconds
        self._open_until = time.monotonic() + OPEN_DEADLINE_SECONDS
        self._lease_until = time.monotonic() + lease_seconds
        self._channel: Channel | None = None
        self.data_socket: socket.socket | None = None
        self.peer_pidfd: int | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes of the pool."""
        return self._worker.used_bytes

    @property
    def isa(self) -> str:
        """Kernel variant in use."""
        return self._worker.isa

    def is_of(self, token: bytes) -> bool:
        """Whether a message that carries the token comes from the connected engine."""
        return hmac.compare_digest(token, self.token)

    @property
    def progress(self) -> int | None:
        """See `HeartbeatReply`."""
        return None if self._channel is None else self._worker.progress

    def renew(self) -> None:
        """Begin the lease anew."""
        self._lease_until = time.monotonic() + self._lease_seconds

    def peer_has_gone(self) -> bool:
        """Whether the system says that the engine closed its end, or ended."""
        if self._channel is not None and self._channel.peer_closed:
            return True
        if self.peer_pidfd is None:
            return False
        poller = select.poll()
        poller.register(self.peer_pidfd, select.POLLIN)
        return bool(poller.poll(0))

    @property
    def deadline(self) -> float | None:
        """When the session ends (``time.monotonic``) unless the engine opens the channel or renews; None for never."""
        if self._channel is None:
            return self._open_until
        return self._lease_until if self._lease_seconds else None

    @property
    def overdue(self) -> str:
        """What the engine failed to do before `deadline`; for the log."""
        if self._channel is None:
            return "did not open its data channel in time"
        return f"sent no heartbeat for {self._lease_seconds:g} s"

    @property
    def wakes_control_thread(self) -> bool:
        """Whether the end of the engine makes `data_socket` readable; otherwise `peer_has_gone` must be asked."""
        return self._channel is None or self.data_socket is not None

    def open_ucx(self, request: OpenUcx) -> tuple[UcxOpened, str]:
        """Connect to the engine's UCX channel, and serve it.

        Returns
        -------
        tuple of UcxOpened and str
            What the engine is told, and what carries the channel.

        Raises
        ------
        ConnectionFailed, ChannelError
        """
        if self._channel is not None:
            raise ChannelError("the engine has a data channel already")
        if self.network is None:
            raise ChannelError("the engine has asked for a channel in shared memory")
        # UCX itself ends the process for a version that it does not know.
        if (
            len(request.address) < MIN_UCX_ADDRESS_BYTES
            or request.address[0] & 0x0F not in UCX_ADDRESS_VERSIONS
        ):
            raise ChannelError("the engine's UCX address is malformed")
        info = load_ucx()
        channel = new_channel(
            request.channel_token, request.ring_bytes, self._spin_us, self.network, request.network
        )
        channel.connect(request.address)
        self._worker.serve(channel)
        self._channel = channel
        return UcxOpened(channel.address), describe_ucx(info, channel)

    def open(self, data_socket: socket.socket) -> bool:
        """Take the channel's memory from a connection to the data socket, and serve it.

        Returns
        -------
        bool
            False if the connection does not bring the right token and the memory of a channel; the caller
            then closes it.
        """
        try:
            token, fds, _, _ = socket.recv_fds(data_socket, len(self.token) + 1, 1)
        except OSError:
            return False
        try:
            if self._channel is not None or len(fds) != 1 or not self.is_of(token):
                return False
            channel = ShmChannel(fds[0], data_socket.fileno(), ShmEnd.WORKER, self._spin_us)
            self._worker.serve(channel)
            data_socket.send(DATA_CHANNEL_OPEN)
        except (ChannelError, OSError, RuntimeError):  # the last: memory, a descriptor or a thread is refused
            return False
        finally:
            for fd in fds:
                os.close(fd)
        self.data_socket, self._channel = data_socket, channel
        # The socket's end of file says that the peer closed it; yet a child the peer forked may hold it open
        # after the peer died. Where the peer's process can be seen from here, its own end is watched too.
        pid = _peer_credentials(data_socket)[0]
        if pid > 0:
            try:
                self.peer_pidfd = os.pidfd_open(pid)
            except OSError:
                self.peer_pidfd = None
        return True

    def stats(self, pool_bytes: int, refused_clients: int) -> WorkerStats:
        """Return the counters."""
        return WorkerStats(
            connected=True,
            pool_bytes=pool_bytes,
            used_bytes=self.used_bytes,
            num_blocks=self.num_blocks,
            isa=self.isa,
            refused_clients=refused_clients,
            **self._worker.counters(),
        )

    def trace(self, action: str) -> Trace:
        """Begin to record frames, or return those recorded."""
        if action == "take":
            return Trace(self._worker.take_trace())
        self._worker.start_trace()
        return Trace(b"")

    def close(self) -> None:
        """Stop serving and give the pool's memory back."""
        self._worker.stop()
        if self.data_socket is not None:
            self.data_socket.close()
        if self.peer_pidfd is not None:
            os.close(self.peer_pidfd)
        self._channel = None
        del self._worker


def is_same_user(data_socket: socket.socket) -> bool:
    """Whether the peer of a unix socket runs as this process's user, or as root."""
    return _peer_credentials(data_socket)[1] in (os.getuid(), 0)


def _peer_credentials(data_socket: socket.socket) -> tuple[int, int]:
    """Return (pid, uid) of the process that connected; the pid is 0 if it lives in another pid namespace."""
    raw = data_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid
