"""One engine's time at an attention worker: its pool, its data channel, its counters."""

import hmac
import os
import secrets
import socket
import struct
import time

from vllm_lamina._native import AttentionWorker, ChannelError
from vllm_lamina.transport.connection import DATA_CHANNEL_OPEN
from vllm_lamina.transport.messages import Configure, Trace, WorkerStats

OPEN_DEADLINE_SECONDS = 10.0
"""How long a configured pool waits for its data channel before another engine may have the worker."""


class EngineSession:
    """The pool of one engine and, once the engine opened it, the data channel.

    Raises
    ------
    ValueError
        No kernel supports the geometry.
    MemoryError
        The system refuses the pool's memory.
    """

    def __init__(self, request: Configure, num_threads: int, cpus: list[int]) -> None:
        self.token = secrets.token_bytes(32)
        self.num_blocks = request.num_blocks
        self._spin_us = request.spin_us
        self._worker = AttentionWorker(
            request.geometry.to_native(), request.num_blocks, num_threads, cpus, request.spin_us
        )
        self._open_until = time.monotonic() + OPEN_DEADLINE_SECONDS
        self.data_socket: socket.socket | None = None
        self.peer_pidfd: int | None = None
        self.peer_pid = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the pool."""
        return self._worker.used_bytes

    @property
    def isa(self) -> str:
        """Kernel variant in use."""
        return self._worker.isa

    def seconds_to_open(self) -> float | None:
        """Seconds left to open the data channel, zero or less if too late; None once it is open."""
        return None if self.data_socket is not None else self._open_until - time.monotonic()

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
            if self.data_socket is not None or len(fds) != 1 or not hmac.compare_digest(token, self.token):
                return False
            self._worker.serve(fds[0], data_socket.fileno(), self._spin_us)
            data_socket.send(DATA_CHANNEL_OPEN)
        except (ChannelError, OSError):
            return False
        finally:
            for fd in fds:
                os.close(fd)
        self.data_socket = data_socket
        # The socket's end of file says that the peer closed it; yet a child the peer forked may hold it open
        # after the peer died. Where the peer's process can be seen from here, its own end is watched too.
        self.peer_pid = _peer_credentials(data_socket)[0]
        if self.peer_pid > 0:
            try:
                self.peer_pidfd = os.pidfd_open(self.peer_pid)
            except OSError:
                self.peer_pidfd = None
        return True

    def stats(self, pool_bytes: int) -> WorkerStats:
        """Return the counters."""
        return WorkerStats(
            connected=True,
            pool_bytes=pool_bytes,
            used_bytes=self.used_bytes,
            num_blocks=self.num_blocks,
            isa=self.isa,
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
        del self._worker


def is_same_user(data_socket: socket.socket) -> bool:
    """Whether the peer of a unix socket runs as this process's user, or as root."""
    return _peer_credentials(data_socket)[1] in (os.getuid(), 0)


def _peer_credentials(data_socket: socket.socket) -> tuple[int, int]:
    """Return (pid, uid) of the process that connected; the pid is 0 if it lives in another pid namespace."""
    raw = data_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid
