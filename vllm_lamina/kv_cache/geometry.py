"""What a KV block holds, and what it takes: the one description of the KV cache that both sides of the wire import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, get_args

import msgspec

from vllm_lamina import _native

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
Positive = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
NotNegative = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
ByHead = Annotated[tuple[float, ...], msgspec.Meta(max_length=1 << 14)]
MAX_LAYERS = 4096


class CacheSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a layer keeps of a token.

    Attributes
    ----------
    block_size
        Tokens per KV block.
    num_kv_heads
        KV heads.
    head_size, head_size_v
        Of q and k, and of v and the output.
    dtype
        Of q, k, v, the output and the cache.
    latent
        v is the first ``head_size_v`` elements of k, which alone is sent and kept, and all query heads share one KV
        head: multi-head latent attention, absorbed (arXiv 2405.04434, section 2.1).
    """

    block_size: Positive
    num_kv_heads: Positive
    head_size: Positive
    head_size_v: Positive
    dtype: DType
    latent: bool = False


class LayerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One attention layer.

    Attributes
    ----------
    cache
        Its `CacheSpec`: an index into ``Geometry.caches``.
    group
        Layers of a group have one block table per request, and one block size.
    position
        Of its cache within the group, from 0 on. Layers of several groups at one position overlay the same memory:
        block ids are unique over all groups.
    num_heads
        Query heads, a multiple of the KV heads.
    scale
        Factor of q . k.
    window
        A token attends itself and ``window - 1`` tokens before it; 0 for all.
    chunk
        A token at position p attends positions ``p // chunk * chunk`` to p; 0 for all.
    soft_cap
        A score is ``soft_cap * tanh(scale * q . k / soft_cap)``; 0 for none.
    sinks
        By query head, or empty: a logit that is added to the softmax denominator alone.
    alibi_slopes
        By query head, or empty: ``slope * (position of the key - position of the query)`` is added to the score.
    stores
        False where the layer attends what the layer of its group and position stores, which comes before it.
    """

    cache: NotNegative
    group: NotNegative
    position: NotNegative
    num_heads: Positive
    scale: float
    window: NotNegative = 0
    chunk: NotNegative = 0
    soft_cap: float = 0.0
    sinks: ByHead = ()
    alibi_slopes: ByHead = ()
    stores: bool = True


@dataclass(frozen=True)
class Group:
    """Layers with one block table per request, and how much of a request's context they see together.

    ``window`` and ``chunk`` are 0 where a layer of the group is not limited so.
    """

    block_size: int
    window: int
    chunk: int

    def context_rows(self, context_len: int, query_len: int) -> int:
        """Of a prefill chunk's query tokens behind so much context, how many see some of it: the first ones."""
        if context_len == 0:
            return 0
        rows = query_len
        if self.window:
            rows = min(rows, self.window - 1)
        if self.chunk:
            rows = min(rows, -context_len % self.chunk)
        return rows

    def num_blocks(self, num_tokens: int, max_step_tokens: int = 0) -> int:
        """The most blocks that a request of so many tokens holds at a time, in steps of ``max_step_tokens``.

        With 0: between steps.
        """
        blocks = -(-num_tokens // self.block_size)
        if self.window:
            # One more: the window need not begin with a block.
            blocks = min(blocks, -(-(self.window - 1 + max_step_tokens) // self.block_size) + 1)
        if self.chunk:
            blocks = min(blocks, -(-(self.chunk + max_step_tokens) // self.block_size))
        return blocks


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The model's attention layers, and what they keep.

    Attributes
    ----------
    caches
        What layers keep of a token: each kind once.
    layers
        In the model's order. Each group has a layer that stores at each of its positions 0, 1, 2 ...
    """

    caches: Annotated[tuple[CacheSpec, ...], msgspec.Meta(max_length=MAX_LAYERS)]
    layers: Annotated[tuple[LayerSpec, ...], msgspec.Meta(max_length=MAX_LAYERS)]

    def __post_init__(self) -> None:
        self.to_native()  # says what does not fit together

    @classmethod
    def uniform(
        cls,
        num_layers: int,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: DType,
        scales: Sequence[float],
        latent_size: int = 0,
    ) -> Geometry:
        """Layers that differ in nothing but their scales. With a ``latent_size``, v is so much of the front of k."""
        if len(scales) != num_layers:
            raise ValueError(f"scales has {len(scales)} entries for {num_layers} layers")
        cache = CacheSpec(
            block_size, num_kv_heads, head_size, latent_size or head_size, dtype, bool(latent_size)
        )
        return cls(
            (cache,),
            tuple(LayerSpec(0, 0, position, num_heads, scale) for position, scale in enumerate(scales)),
        )

    def to_native(self) -> _native.ModelGeometry:
        """Return the same geometry for native code.

        Raises
        ------
        ValueError
            Layers and caches do not fit together; the text names the value and the limit.
        """
        return _native.ModelGeometry(
            [_native.CacheSpec(**msgspec.structs.asdict(cache)) for cache in self.caches],
            [_native.LayerSpec(**msgspec.structs.asdict(layer)) for layer in self.layers],
        )

    @property
    def num_layers(self) -> int:
        """Attention layers."""
        return len(self.layers)

    @property
    def num_groups(self) -> int:
        """Block tables per request."""
        return len(self.groups)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups; ``reach`` in csrc/wire/model_geometry.h is the same rule."""
        groups = []
        for number in range(1 + max(layer.group for layer in self.layers)):
            layers = [layer for layer in self.layers if layer.group == number]
            windows, chunks = [layer.window for layer in layers], {layer.chunk for layer in layers}
            groups.append(
                Group(
                    self.caches[layers[0].cache].block_size,
                    max(windows) if all(windows) else 0,
                    chunks.pop() if len(chunks) == 1 else 0,
                )
            )
        return tuple(groups)

    @cached_property
    def shared_places(self) -> frozenset[tuple[int, int]]:
        """Group and position of layers whose k and v others attend too."""
        return frozenset((layer.group, layer.position) for layer in self.layers if not layer.stores)

    @cached_property
    def divisible_heads(self) -> tuple[int, ...]:
        """Of each cache, the heads by which several workers can divide attention.

        KV heads, with their query heads; of a latent cache, whose one KV head they all hold, query heads.
        """
        query_heads = {layer.cache: layer.num_heads for layer in self.layers}
        return tuple(
            query_heads[number] if cache.latent else cache.num_kv_heads
            for number, cache in enumerate(self.caches)
        )

    @property
    def has_latent_cache(self) -> bool:
        """Whether a worker that has some of the heads keeps as much as one that has all."""
        return any(cache.latent for cache in self.caches)

    def block_size(self, group: int) -> int:
        """Tokens per block of a group."""
        return self.groups[group].block_size

    def block_bytes(self) -> int:
        """Bytes that a block id takes of a pool on this host, by the kernels that its CPU gets.

        That is, over all positions, the largest block of the layers that overlay there.

        Raises
        ------
        ValueError
            No kernel supports the geometry.
        """
        return _native.kv_block_bytes(self.to_native())

    def num_blocks(self, num_tokens: int, max_step_tokens: int = 0) -> int:
        """The most blocks that one request of so many tokens holds at a time, over all groups."""
        return sum(group.num_blocks(num_tokens, max_step_tokens) for group in self.groups)

    def with_heads(self, first: Sequence[int], count: Sequence[int]) -> Geometry:
        """The same for ``count`` of each cache's `divisible_heads`, from ``first`` on."""
        caches = tuple(
            cache if cache.latent else msgspec.structs.replace(cache, num_kv_heads=number)
            for cache, number in zip(self.caches, count, strict=True)
        )
        layers = []
        for layer in self.layers:
            query_heads = layer.num_heads // self.divisible_heads[layer.cache]
            begin, number = (heads[layer.cache] * query_heads for heads in (first, count))
            heads = slice(begin, begin + number)
            layers.append(
                msgspec.structs.replace(
                    layer,
                    num_heads=number,
                    sinks=layer.sinks[heads],
                    alibi_slopes=layer.alibi_slopes[heads],
                )
            )
        return Geometry(caches, tuple(layers))

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
        rows = [native.row_bytes(layer) for layer in range(self.num_layers)]
        layer = max_tokens * max(max(q + k + v, out + lse) for q, k, v, out, lse in rows)
        step = sum(
            max_requests * (8 * -(-max_model_len // group.block_size) + 64) + 8 * max_tokens
            for group in self.groups
        )
        return 2 * (layer + step) + (1 << 20)
