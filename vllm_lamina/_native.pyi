"""Native part of vllm-lamina: attention kernel, channels, attention worker.

Arrays are NumPy arrays, CPU tensors or anything else with DLPack or a buffer; hence `Any`.
"""

from enum import Enum
from typing import Any

# csrc/kernel

class Arena:
    """Zeroed memory on huge pages."""

    def __init__(self, size: int) -> None: ...
    @property
    def size(self) -> int:
        """Bytes, a multiple of 2 MiB."""
    def clear(self) -> None:
        """Give all pages back; the arena reads as zeros again."""
    def array(self) -> Any:
        """Return the memory as a uint8 array that keeps the arena alive."""

class ThreadPool:
    """The threads a kernel call runs on, the caller's included."""

    def __init__(self, num_threads: int, cpus: list[int] = ..., spin_us: int = 100) -> None: ...
    @property
    def size(self) -> int: ...
    def pin_caller(self) -> None:
        """Pin the calling thread to cpus[0]."""

class AttentionKernel:
    """Paged attention of one geometry on one instruction set."""

    def __init__(
        self,
        dtype: str,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        isa: str | None = None,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def block_bytes(self) -> int: ...
    def append(self, layer: Any, k: Any, v: Any, slot_mapping: Any, threads: ThreadPool) -> None: ...
    def attend(
        self,
        layer: Any,
        q: Any,
        query_start_loc: Any,
        kv_lens: Any,
        block_tables: Any,
        scale: float,
        out: Any,
        lse: Any | None,
        threads: ThreadPool,
    ) -> None: ...
    def copy_block(self, layer: Any, source: int, destination: int) -> None: ...
    def zero_block(self, layer: Any, block: int) -> None: ...

def linear_read(memory: Any, threads: ThreadPool) -> int:
    """Read the memory, uint8, front to back and return a checksum."""

def available_isas() -> list[str]:
    """Return the names of the kernel variants this CPU can run, best last."""

# csrc/transport

class ChannelError(RuntimeError):
    """Base of the channel's errors."""

class ChannelTimeout(ChannelError):
    """The deadline passed; the channel is still usable."""

class ChannelClosed(ChannelError):
    """The peer closed the channel or died."""

class FrameTooLarge(ChannelError):
    """The frame can never fit the channel; the text says which capacity to raise."""

class ShmEnd(Enum):
    """The two ends of a channel over shared memory."""

    CLIENT = 0
    WORKER = 1

def create_shm_memory(ring_bytes: int) -> int:
    """Make the memory of a channel, `ring_bytes` for each direction. The caller closes the descriptor."""

class ShmChannel:
    """A channel over shared memory, for tests and benchmarks; timeouts are seconds."""

    def __init__(self, memory_fd: int, liveness_fd: int, end: ShmEnd, spin_us: int = 100) -> None: ...
    def send(self, payload: bytes, timeout: float) -> None: ...
    def receive(self, timeout: float) -> bytes: ...
    def close(self) -> None: ...
    @property
    def peer_closed(self) -> bool: ...
    @property
    def max_frame_bytes(self) -> int: ...
    @property
    def num_bad_descriptors(self) -> int: ...
    def echo_until_closed(self) -> None:
        """Answer every frame with one of the same size, until the peer leaves."""
    def ping_pong(self, bytes: int, count: int, timeout: float) -> list[int]:
        """Send `count` frames to an echo, one after the other; return the round trips in nanoseconds."""

# csrc/worker

class ModelGeometry:
    """What both ends of the exchange must know of the model's attention; see `messages.Geometry`."""

    def __init__(
        self,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: str,
        scales: list[float],
    ) -> None: ...
    @property
    def num_layers(self) -> int: ...

def kv_block_bytes(geometry: ModelGeometry) -> int:
    """Return the bytes of the pool that one KV block takes over all layers.

    Raises
    ------
    ValueError
        No kernel supports the geometry; the text names the value and the limit.
    """

class AttentionWorker:
    """The attention worker's serving loop, for one engine, on a thread of its own."""

    def __init__(
        self,
        geometry: ModelGeometry,
        num_blocks: int,
        num_threads: int,
        cpus: list[int] = ...,
        spin_us: int = 100,
    ) -> None: ...
    def serve(self, memory_fd: int, liveness_fd: int, spin_us: int = 100) -> None:
        """Start serving the channel; both descriptors stay the caller's."""
    def stop(self) -> None:
        """End the serving thread after the frame in hand, and close the channel."""
    @property
    def used_bytes(self) -> int: ...
    @property
    def isa(self) -> str: ...
    def start_trace(self) -> None:
        """Record every STEP and ATTEND frame until `take_trace`."""
    def take_trace(self) -> bytes:
        """End the recording; returns it as uint64 [events, 8]: frame type, lane, layer, tokens, and the times, in
        nanoseconds of the steady clock, at which the model worker began and posted it, and at which it was received and
        done."""
    def counters(self) -> dict[str, int]:
        """Return the counters, by the names of `messages.WorkerStats`."""

class AttentionWorkerError(RuntimeError):
    """The attention worker dropped a frame; the text is its reason."""

class AttentionClient:
    """The model worker's side of the data channel; see `AttentionWorkerConnection.configure`.

    Pointers are addresses (`tensor.data_ptr()`), strides are bytes from token to token, timeouts are seconds.
    Each lane may be used by a thread of its own. All methods raise ChannelClosed if the worker is gone,
    ChannelTimeout if it does not keep up.

    Attributes
    ----------
    generation
        Marks all later steps; what the worker answers to steps of another generation is dropped.
    """

    generation: int
    def __init__(
        self, geometry: ModelGeometry, memory_fd: int, liveness_fd: int, spin_us: int = 100
    ) -> None: ...
    def step_times(self, lane: int) -> tuple[float, float]:
        """Seconds of the lane's last step: those spent in `collect`, and those that the attention worker spent."""
    def join_turn(self, lane: int) -> None:
        """Say that the lane's next step begins after all that joined before it."""
    def begin_turn(self, lane: int, timeout: float = 60.0) -> None:
        """Wait for the lane's turn on the compute device; `collect` then gives it away and takes it back."""
    def end_turn(self, lane: int) -> None:
        """Leave the rotation of lanes."""
    def begin_step(
        self,
        lane: int,
        num_decodes: int,
        query_lens: Any,
        context_lens: Any,
        block_table: Any,
        slot_mapping: Any,
        timeout: float = 60.0,
    ) -> tuple[int, int]:
        """Describe the lane's next step to the worker; everything is copied at once.

        Parameters
        ----------
        lane
            0 to 7.
        num_decodes
            Requests that decode; they come first, with one query token each.
        query_lens, context_lens
            [num_requests], int32: new tokens, and tokens already in the cache.
        block_table
            [>= num_requests, max_blocks], int32, rows may be strided; only the blocks that a request's
            context and query fill are read.
        slot_mapping
            [num_tokens], int64; -1 for a token that is not stored.

        Returns
        -------
        tuple[int, int]
            Rows of q that `post` sends, and how many of these are prefill rows with context, which `collect`
            returns in `context_out` and `context_lse`.

        Raises
        ------
        ValueError
            The numbers do not add up; the text names the request.
        FrameTooLarge
            One layer of the step does not fit the channel.
        """
    def post(
        self,
        lane: int,
        layer: int,
        q: int,
        q_stride: int,
        k: int,
        k_stride: int,
        v: int,
        v_stride: int,
        timeout: float = 60.0,
    ) -> None:
        """Send one layer's q rows and all k, v; they may be overwritten when this returns.

        q, k, v: the step's tokens in order, [num_tokens, heads, head_size]; the rows of prefill chunks
        without context are not read from q.
        """
    def collect(
        self,
        lane: int,
        layer: int,
        out: int,
        out_stride: int,
        context_out: int = 0,
        context_lse: int = 0,
        timeout: float = 60.0,
    ) -> None:
        """Wait for one layer's output; returns at once if the step has no q rows.

        Parameters
        ----------
        layer
            The oldest layer that was posted and not collected.
        out
            [num_tokens, num_heads, head_size]; rows [0, num_decodes) are written.
        context_out
            [context rows, num_heads, head_size], contiguous; 0 if the step has no context rows.
        context_lse
            [context rows, num_heads], float32, contiguous; 0 if the step has no context rows.

        Raises
        ------
        AttentionWorkerError
            The worker dropped a frame of this generation.
        """
    def attend(
        self,
        lane: int,
        layer: int,
        q: int,
        q_stride: int,
        k: int,
        k_stride: int,
        v: int,
        v_stride: int,
        out: int,
        out_stride: int,
        context_out: int = 0,
        context_lse: int = 0,
        timeout: float = 60.0,
    ) -> None:
        """`post` and `collect` in one call: the fast path of a decode step."""
    def zero_blocks(self, block_ids: Any, timeout: float = 60.0) -> None:
        """Zero blocks in all layers. block_ids: [n], int32."""
    def close(self) -> None:
        """Leave the worker; every wait ends with ChannelClosed."""
    def copy_blocks(self, pairs: Any, timeout: float = 60.0) -> None:
        """Copy blocks in all layers, in order. pairs: [n, 2], int32, (source, destination)."""
