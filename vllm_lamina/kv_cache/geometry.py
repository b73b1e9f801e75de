"""What a KV block holds, and what it takes: the one description of the KV cache that both sides of the wire import."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from vllm_lamina._native import ModelGeometry, kv_block_bytes

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
Positive = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]


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

    num_layers: Positive
    block_size: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_size: Positive
    dtype: DType
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.scales) != self.num_layers:
            raise ValueError(f"scales has {len(self.scales)} entries for {self.num_layers} layers")

    def to_native(self) -> ModelGeometry:
        """Return the same geometry for native code."""
        return ModelGeometry(
            block_size=self.block_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.dtype,
            scales=list(self.scales),
        )

    def block_bytes(self) -> int:
        """Bytes that a block of all layers takes of a pool on this host, by the kernel that its CPU gets.

        Raises
        ------
        ValueError
            No kernel supports the geometry.
        """
        return kv_block_bytes(self.to_native())

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of so many tokens of one request."""
        return -(-num_tokens // self.block_size)

    def with_kv_heads(self, num_kv_heads: int) -> Geometry:
        """The same for some of the KV heads, with the query heads that belong to them."""
        group = self.num_heads // self.num_kv_heads
        return msgspec.structs.replace(self, num_heads=num_kv_heads * group, num_kv_heads=num_kv_heads)

    def ring_bytes(self, max_tokens: int, max_requests: int, max_model_len: int) -> int:
        """Capacity of a channel that holds two of the largest frames: one layer's q, k and v of a full step.

        Parameters
        ----------
        max_tokens, max_requests
            Of one step.
        max_model_len
            Tokens of the longest request.
        """
        native = self.to_native()
        layer = max_tokens * (native.q_row_bytes + 2 * native.kv_row_bytes)
        step = max_requests * (4 * self.num_blocks(max_model_len) + 64) + 8 * max_tokens
        return 2 * (layer + step) + (1 << 20)
