"""The model worker's end of an attention worker: control socket, data channel, and how both are opened."""

from types import TracebackType

from vllm_lamina._native import AttentionClient
from vllm_lamina.transport.messages import Geometry, WorkerStats

DEFAULT_RING_BYTES = 1 << 30


class AttentionWorkerConnection:
    """A connection to one attention worker.

    Examples
    --------
    >>> with AttentionWorkerConnection.connect("tcp://127.0.0.1:7100") as worker:
    ...     num_blocks = worker.pool_bytes // worker.block_bytes(geometry)
    ...     worker.configure(geometry, num_blocks)
    ...     worker.client.begin_step(...)
    """

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
        raise NotImplementedError

    @property
    def pool_bytes(self) -> int:
        """Memory the worker offers for KV blocks."""
        raise NotImplementedError

    @property
    def client(self) -> AttentionClient:
        """The native client of the data channel; there after `configure`."""
        raise NotImplementedError

    def block_bytes(self, geometry: Geometry) -> int:
        """Bytes of the pool one KV block takes over all layers. Raises WorkerRefused for an unsupported geometry."""
        raise NotImplementedError

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
            Capacity of the channel in each direction; pages are taken as they are touched. The largest frame is one
            layer's q, k and v of a whole step.
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
        raise NotImplementedError

    def stats(self) -> WorkerStats:
        """Ask the worker for its counters."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the worker, which drops its pool and waits for the next engine."""
        raise NotImplementedError

    def __enter__(self) -> "AttentionWorkerConnection":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
