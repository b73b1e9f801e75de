"""Native part of vllm-lamina: attention kernel, channels, attention worker.

Arrays are NumPy arrays, CPU tensors or anything else with DLPack or a buffer; hence `Any`.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

# csrc/kernel

class Arena:
    """Zeroed memory on huge pages."""

    def __init__(self, size: int) -> None: ...
    @property
    def size(self) -> int:
        """Bytes, a multiple of 2 MiB."""
    def array(self) -> Any:
        """Return the memory as a uint8 array that keeps the arena alive."""

class ThreadPool:
    """The threads a kernel call runs on, the caller's included."""

    def __init__(self, num_threads: int, cpus: list[int] = ..., spin_us: int = 100) -> None: ...
    @property
    def size(self) -> int: ...
    def pin_caller(self) -> None:
        """Pin the calling thread to cpus[0]."""

class ScoreRule:
    """What a layer does with the scores ``q.k``: a key at position j is seen by the query at position p, j <= p, if
    window and chunk allow it.

    Parameters
    ----------
    scale
        Softmax scale.
    soft_cap
        The score is ``soft_cap * tanh(scale * q.k / soft_cap)``; 0 for none.
    window
        Tokens that a query sees, its own among them: ``j > p - window``; 0 for all.
    chunk
        ``j >= p // chunk * chunk``; 0 for none.
    sinks
        By query head: a logit that is added to the softmax denominator only; or empty.
    alibi_slopes
        By query head: ``slope * (j - p)`` is added to the score, after scale and soft-cap; or empty.
    """

    def __init__(
        self,
        scale: float,
        soft_cap: float = 0.0,
        window: int = 0,
        chunk: int = 0,
        sinks: Sequence[float] = (),
        alibi_slopes: Sequence[float] = (),
    ) -> None: ...

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
        head_size_v: int | None = None,
        latent: bool = False,
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
        rule: ScoreRule,
        out: Any,
        lse: Any | None,
        threads: ThreadPool,
        positions: Any | None = None,
        block_positions: Any | None = None,
        num_complete_tokens: int = 0,
    ) -> None: ...
    def copy_block(self, layer: Any, source: int, destination: int) -> None: ...
    def zero_block(self, layer: Any, block: int) -> None: ...

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

class Channel:
    """One end of a channel; its methods are for tests and benchmarks, timeouts are seconds."""

    def send(self, payload: bytes, timeout: float) -> None: ...
    def receive(self, timeout: float) -> bytes: ...
    def close(self) -> None: ...
    @property
    def peer_closed(self) -> bool: ...
    @property
    def max_frame_bytes(self) -> int: ...
    @property
    def num_bad_descriptors(self) -> int: ...

class ShmChannel(Channel):
    """A channel over shared memory; both descriptors stay the caller's."""

    def __init__(self, memory_fd: int, liveness_fd: int, end: ShmEnd, spin_us: int = 100) -> None: ...

def refuse_connections(listener: int) -> None:
    """Let the kernel drop what asks this socket for a connection; peers ask again after a second, then after two, and
    so on.

    Connections stay, those too that wait to be accepted. Raises ChannelError where the system has no such filter, or no
    memory for it.
    """

def admit_connections(listener: int) -> None:
    """Take new connections again, after `refuse_connections`. Raises ChannelError."""

class UcxInfo:
    """The UCX that this process uses."""

    @property
    def path(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def transports(self) -> list[str]:
        """Transports over devices that it finds here, such as "tcp/eth0" or "rc_mlx5/mlx5_0:1"."""
    @property
    def has_rdma(self) -> bool: ...

def load_ucx(path: str) -> UcxInfo:
    """Load the libucp at `path`, once per process; see `transport.ucx.load_ucx`. Raises ChannelError."""

def interface_addresses() -> list[tuple[str, str]]:
    """Return (network interface, numeric IP address) of the interfaces that are up."""

class UcxChannel(Channel):
    """A channel over UCX, after `load_ucx`.

    Both ends are made with the same token and `ring_bytes`, exchange their addresses over a connection that
    they trust, `admit` each other's hosts and `connect`; what one sends before the other connects is not lost.

    Parameters
    ----------
    token
        16 random bytes, one token per channel. Messages without it are dropped and counted.
    ring_bytes
        Capacity of the channel in each direction. Pages are taken as they are touched, or locked at once where
        RDMA registers them.
    spin_us
        How long a wait polls before it sleeps; 0 where threads outnumber CPUs.
    network_devices
        What the channel may use, as in ``UCX_NET_DEVICES``, which takes precedence; "" for all. See
        `transport.ucx.network_of`.
    prefer_ipv6
        Whether UCX takes a device's first IPv6 address, not its first IPv4 address, where it has both.

    Raises
    ------
    ChannelError
        UCX cannot use the devices or register the memory.
    """

    def __init__(
        self,
        token: bytes,
        ring_bytes: int,
        spin_us: int = 100,
        network_devices: str = "",
        prefer_ipv6: bool = False,
    ) -> None: ...
    @property
    def address(self) -> bytes:
        """What the peer's `connect` needs, some 100 to 1000 bytes."""
    def admit(self, hosts: list[str]) -> None:
        """Let these numeric IP addresses connect over TCP, and nobody else.

        Before the first call nobody may: the kernel drops their packets. Raises ChannelError.
        """
    def connect(self, peer_address: bytes) -> None:
        """Begin to connect; returns at once. The address must come from a trusted peer."""
    def wait_connected(self, timeout: float) -> None:
        """Wait until the peer has connected too. Raises ChannelTimeout, ChannelClosed."""
    @property
    def transports(self) -> list[str]:
        """Transports over devices that the channel uses; empty before `connect`."""
    @property
    def has_rdma(self) -> bool: ...

# csrc/worker

class CacheSpec:
    """What a layer keeps of a token; see `geometry.CacheSpec`."""

    def __init__(
        self,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        head_size_v: int,
        dtype: str,
        latent: bool,
    ) -> None: ...

class LayerSpec:
    """One attention layer; see `geometry.LayerSpec`."""

    def __init__(
        self,
        cache: int,
        group: int,
        position: int,
        num_heads: int,
        scale: float,
        window: int,
        chunk: int,
        soft_cap: float,
        sinks: Sequence[float],
        alibi_slopes: Sequence[float],
        stores: bool,
    ) -> None: ...

class ModelGeometry:
    """What both ends of the exchange must know of the model's attention; see `geometry.Geometry`.

    Raises ValueError for what does not fit together; the text names the value and the limit.
    """

    def __init__(self, caches: list[CacheSpec], layers: list[LayerSpec]) -> None: ...
    @property
    def num_layers(self) -> int: ...
    def row_bytes(self, layer: int) -> tuple[int, int, int, int, int]:
        """Bytes of one token's q, k, v, output and LSE in a layer; k and v are 0 where it does not store."""

def kv_block_bytes(geometry: ModelGeometry) -> int:
    """Return the bytes of the pool that one KV block takes over all positions.

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
    def serve(self, channel: Channel) -> None:
        """Start serving the channel."""
    def stop(self) -> None:
        """End the serving thread soon, whatever frame is in hand, and close the channel."""
    @property
    def used_bytes(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def progress(self) -> int:
        """Grows at least every 100 ms while the serving thread is well, also during one long frame and while it idles;
        never shrinks. One that stands still for seconds is stuck. 0 before `serve`."""
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

class Partition:
    """How the KV cache is divided over the attention workers."""

    @staticmethod
    def by_heads(geometry: ModelGeometry, heads: list[list[int]]) -> Partition:
        """Worker i holds the next ``kv_heads[i][c]`` KV heads of all tokens in cache c, with their query heads.

        Blocks have the same ids on all workers. Raises ValueError unless the numbers are positive and add up to the
        cache's KV heads.
        """
    @staticmethod
    def by_blocks(geometry: ModelGeometry, num_blocks: list[int]) -> Partition:
        """Worker i holds the next ``num_blocks[i]`` KV blocks, all heads of them; it numbers them from 0.

        Raises ValueError unless the numbers are positive.
        """

WAIT_BOUNDS: tuple[float, ...]
"""Upper bounds, in seconds, of the classes of `AttentionClient.step_waits`."""

def create_turn_log() -> int:
    """Make the memory by which the ranks of one host share their turns. The caller closes the descriptor."""

class AttentionClient:
    """The model worker's side of the data channels; see `AttentionWorkerConnection.channel`.

    Pointers are addresses (`tensor.data_ptr()`), strides are bytes from token to token, timeouts are seconds.
    Each lane may be used by a thread of its own. Where a worker is gone or does not keep up, `collect` raises
    ChannelClosed or ChannelTimeout; the step cannot be completed then.

    Attributes
    ----------
    generation
        Marks all later steps; what the worker answers to steps of another generation is dropped.
    """

    generation: int
    def __init__(self, channels: list[Channel], partition: Partition) -> None:
        """One channel for each worker of the partition, in its order."""
    def step_times(self, lane: int) -> tuple[float, float]:
        """Seconds of the lane's last step: those spent in `collect`, and those that the slowest attention worker of
        each layer spent."""
    def step_waits(self, lane: int) -> tuple[tuple[int, ...], float]:
        """How long `collect` waited for each layer's output in the lane's last step, while it was the lane's turn.

        Waits in each class (up to the bounds of `WAIT_BOUNDS`, and beyond the last), and their sum in seconds.
        """
    def share_turns(self, memory_fd: int, rank: int) -> None:
        """Let the lanes of all ranks of a tensor-parallel model take the same turns, those of rank 0; before the first.

        The descriptor is one of `create_turn_log`, and stays the caller's.
        """
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
        groups: Sequence[tuple[Any, Any]],
        timeout: float = 60.0,
    ) -> list[tuple[int, int]]:
        """Describe the lane's next step to the workers that have a part in it; everything is copied at once.

        Parameters
        ----------
        lane
            0 to 7.
        num_decodes
            Requests that decode; they come first, with one query token each.
        query_lens, context_lens
            [num_requests], int32: new tokens, and tokens already in the cache.
        groups
            For each group of layers the block table, [>= num_requests, max_blocks], int32, whose rows may be strided
            and of which only the blocks are read that a request's context and query fill and a layer may see; and the
            slot mapping, [num_tokens], int64, -1 for a token that is not stored.

        Returns
        -------
        list[tuple[int, int]]
            By group: rows of q that are attended, and how many of these are prefill rows that see some context
            (`geometry.Group.context_rows`), which `collect` returns in `context_out` and `context_lse`.

        Raises
        ------
        ValueError
            The numbers do not add up, or name a block that no worker has; the text says which.
        FrameTooLarge
            One layer of the step does not fit a channel.
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
        """Send each worker its part of one layer's q rows and k, v; they may be overwritten when this returns.

        q, k, v: the step's tokens in order, [num_tokens, heads, head_size]; rows of prefill chunks that see no context
        are not read from q, and k and v not at all for a layer that does not store.
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
        """Wait for one layer's output; returns at once if it has no q rows.

        A worker that was lost since the step was opened shows here and only here, as ChannelClosed.

        Rows that several workers attended, each over its own tokens, are merged by LSE in float32.

        Parameters
        ----------
        layer
            The oldest layer that was posted and not collected.
        out
            [num_tokens, num_heads, head_size_v]; rows [0, num_decodes) are written, the layer's sinks counted.
        context_out
            [context rows, num_heads, head_size_v], contiguous; 0 if the layer's group has no context rows.
        context_lse
            [context rows, num_heads], float32, contiguous; 0 likewise. No sinks are counted in these.

        Raises
        ------
        AttentionWorkerError
            A worker dropped a frame of this generation.
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
    def fail_step(self, lane: int, why: str) -> None:
        """Let what is left of the lane's step send nothing and wait for no worker; each `collect` still takes its turn,
        and raises ChannelClosed."""
    @property
    def failed_workers(self) -> list[int]:
        """Workers that are gone, or that did not take a frame or answer in time: places in the partition."""
    def replace_channel(self, worker: int, channel: Channel) -> None:
        """Give a worker's part to whoever serves ``channel``. No lane may be in a step."""
    def zero_blocks(self, block_ids: Any, timeout: float = 60.0) -> None:
        """Zero blocks in all layers. block_ids: [n], int32."""
    def copy_blocks(self, pairs: Any, timeout: float = 60.0) -> None:
        """Copy blocks in all layers, in order. pairs: [n, 2], int32, (source, destination).

        Raises ValueError for a pair on two workers: KV blocks do not travel between workers.
        """

class StreamedExchange:
    """What passes between lanes on a device's streams and the attention workers; see csrc, and `StreamedLayers`.

    Parameters
    ----------
    client
        Its channels have carried nothing yet. Its `post`, `collect` and turns within a step are not used any more.
    max_tokens
        Of a step.
    spin_us
        How long the proxy's thread polls before it sleeps. None where there is no such thread, see `serve_once`.

    Raises
    ------
    FrameTooLarge
        The channels have no room for the lanes' frames: `memory_bytes`.
    """

    POISON: int
    def __init__(
        self, client: AttentionClient, num_lanes: int, max_tokens: int, spin_us: int | None
    ) -> None: ...
    @staticmethod
    def memory_bytes(geometry: ModelGeometry, num_lanes: int, max_tokens: int) -> int:
        """Bytes that the lanes' frames take of a channel's ring, for a worker with this geometry."""
    @property
    def memories(self) -> list[tuple[int, int]]:
        """Address and bytes of all that a device has to reach; other memory after `replace_channel`."""
    def words(self, lane: int) -> tuple[int, int, int, int, int]:
        """Addresses: the int32 words `packed`, `taken` (the device writes), `free` and `replied` (it waits for), which
        count the layers of the step, and the int64 addresses of the workers' replies."""
    def payload(self, lane: int, worker: int, layer: int) -> int:
        """Address of the payload of a layer's frame for a worker."""
    def announce(self, lane: int) -> None:
        """The lane's next step comes after all that were announced before."""
    def begin_step(
        self,
        lane: int,
        num_decodes: int,
        query_lens: Any,
        context_lens: Any,
        groups: Sequence[tuple[Any, Any]],
        timeout: float = 60.0,
    ) -> list[tuple[int, int]]:
        """As `AttentionClient.begin_step`; the step was announced, and the stream is done with the one before."""
    def part(self, lane: int, worker: int, group: int) -> tuple[Any, Any, int]:
        """Of the step in the layers of a group: tokens whose q, and whose k and v, the worker gets, int32; and how many
        rows it answers without LSE."""
    def finish_step(self, lane: int, timeout: float = 60.0) -> str | None:
        """Wait until all layers are sent and answered, or the step failed: why. Raises ChannelTimeout if a layer takes
        the device longer than `timeout` seconds."""
    def fail_step(self, lane: int, why: str) -> None:
        """Let the step run to its end for nothing."""
    def replace_channel(self, worker: int, channel: Channel) -> None:
        """As `AttentionClient.replace_channel`."""
    def serve_once(self) -> bool:
        """One round of the proxy: send what is packed, show what came. Whether there was anything."""
    def set_timeout(self, seconds: float) -> None:
        """How long an attention worker may take for one layer."""
