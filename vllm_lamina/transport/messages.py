"""Control messages between a model worker and an attention worker: tagged structs, in msgpack."""

from typing import Literal

import msgspec

PROTOCOL_VERSION = 1
"""Raised whenever a message below changes its meaning; both sides must have the same."""

DType = Literal["float32", "bfloat16", "float16"]


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape of the model's attention, the same for all layers.

    Attributes
    ----------
    num_layers
        Attention layers.
    block_size
        Tokens per KV block, a multiple of 32.
    num_heads, num_kv_heads
        Query heads, a multiple of the KV heads.
    head_size
        32 to 256, a multiple of 16.
    dtype
        Of q, k, v, the output and the cache.
    scales
        Softmax scale of each layer.
    """

    num_layers: int
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: DType
    scales: tuple[float, ...]


class WorkerStats(msgspec.Struct, frozen=True, tag="stats", forbid_unknown_fields=True):
    """Counters of an attention worker since its current engine connected; times are nanoseconds.

    Attributes
    ----------
    connected
        Whether an engine is connected; without one all counters are zero.
    ns_waiting
        Between the frames of a step in flight.
    ns_idle
        With no step in flight.
    """

    connected: bool
    pool_bytes: int
    used_bytes: int
    num_blocks: int
    steps: int
    messages: int
    bytes_in: int
    bytes_out: int
    tokens_appended: int
    ns_attending: int
    ns_appending: int
    ns_waiting: int
    ns_idle: int
    rejected_frames: int
