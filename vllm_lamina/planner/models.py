"""Describes a model by what costs time and memory: its parameters, its KV cache and its traffic per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from vllm_lamina.planner.devices import Array


@dataclass(frozen=True)
class Experts:
    """The routed experts of a mixture-of-experts model.

    Attributes
    ----------
    count, per_token
        Experts of a layer, and how many of them each token visits.
    params
        Parameters of one expert of one layer.
    layers
        Layers that have routed experts.
    """

    count: int
    per_token: int
    params: int
    layers: int

    def touched(self, tokens: ArrayLike) -> Array:
        """Experts of a layer expected to be read by a batch, if the router is uniform and independent.

        Each token leaves a given expert out with probability ``1 - per_token / count``.
        """
        miss = 1.0 - self.per_token / self.count
        return self.count * (1.0 - miss ** np.asarray(tokens, dtype=np.float64))


@dataclass(frozen=True)
class AttentionLayers:
    """Layers whose attention is alike.

    Attributes
    ----------
    count
        How many.
    heads, kv_heads, head_size
        Query heads, KV heads, elements of one head.
    window
        Tokens of the context that each sees at most, of a sliding window or a chunk; 0 for all.
    stores
        Whether each keeps k and v; if not, it attends those of another layer.
    latent_size
        With multi-head latent attention: elements at the front of a token's latent row that are its values, where the
        row, of ``head_size``, is its one key. 0: values of their own, of ``head_size``.
    expanded_size
        Then, elements of one head's key and value together, as prompts are attended.
    """

    count: int
    heads: int
    kv_heads: int
    head_size: int
    window: int = 0
    stores: bool = True
    latent_size: int = 0
    expanded_size: int = 0

    @property
    def value_size(self) -> int:
        """Elements of one head's output."""
        return self.latent_size or self.head_size

    @property
    def kept_elements(self) -> int:
        """Elements of a token's k and v in one layer, or of its latent row."""
        return self.kv_heads * self.head_size * (1 if self.latent_size else 2)


@dataclass(frozen=True)
class Reach:
    """How much of a request is kept, or read for each of its tokens, in tokens that all layers keep, or read.

    Attributes
    ----------
    growing
        Share of the bytes of a token that are of layers without a window.
    windows
        Windows, and the share of each.
    """

    growing: float
    windows: tuple[tuple[int, float], ...] = ()

    def bounded(self, tokens: ArrayLike) -> Array:
        """The part of a request of so many tokens that windows keep from growing."""
        lengths = np.asarray(tokens, dtype=np.float64)
        return sum((share * np.minimum(lengths, window) for window, share in self.windows), 0.0 * lengths)

    def tokens(self, tokens: ArrayLike) -> Array:
        """All of a request of so many tokens."""
        return self.growing * np.asarray(tokens, dtype=np.float64) + self.bounded(tokens)


@dataclass(frozen=True)
class Model:
    """A decoder-only model.

    Attributes
    ----------
    name
        For people.
    hidden, attention
        Elements of the hidden state, d, and the layers' attention.
    dense_params
        Parameters that every token multiplies with: all but routed experts and the input embedding.
    embedding_params
        Input embedding, which occupies memory and is looked up, not multiplied with. 0 if tied to the LM head.
    experts
        Routed experts, or None for a dense model.
    bytes_per_element
        e: of weights, activations and KV cache alike (2 for 16 bit).
    source
        Where the description comes from.
    """

    name: str
    hidden: int
    attention: tuple[AttentionLayers, ...]
    dense_params: int
    embedding_params: int
    experts: Experts | None = None
    bytes_per_element: int = 2
    source: str = ""

    @property
    def layers(self) -> int:
        """L: layers of all kinds."""
        return sum(kind.count for kind in self.attention)

    @property
    def kv_heads(self) -> int:
        """KV heads, of the layers that have the fewest."""
        return min(kind.kv_heads for kind in self.attention)

    @property
    def group(self) -> float:
        """G: query heads per KV head, on average over the layers."""
        queries = sum(kind.count * kind.heads * kind.head_size for kind in self.attention)
        return queries / sum(kind.count * kind.kv_heads * kind.head_size for kind in self.attention)

    def heads_divide_by(self, parts: int) -> bool:
        """Whether the KV heads of every layer can be shared evenly."""
        return all(kind.kv_heads % parts == 0 for kind in self.attention)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory."""
        routed = self.experts.count * self.experts.params * self.experts.layers if self.experts else 0
        return self.bytes_per_element * (self.dense_params + self.embedding_params + routed)

    @property
    def active_params(self) -> int:
        """N: parameters that one token multiplies with."""
        routed = self.experts.per_token * self.experts.params * self.experts.layers if self.experts else 0
        return self.dense_params + routed

    def streamed_bytes(self, tokens: ArrayLike) -> Array:
        """Bytes of weights that a step over so many tokens reads from memory."""
        dense = np.full_like(np.asarray(tokens, dtype=np.float64), self.bytes_per_element * self.dense_params)
        if self.experts is None:
            return dense
        return (
            dense
            + self.bytes_per_element
            * self.experts.params
            * self.experts.layers
            * self.experts.touched(tokens)
        )

    @property
    def query_bytes_per_token(self) -> int:
        """Bytes of one token's q, all layers: e d L where heads * head size = d."""
        return self.bytes_per_element * sum(k.count * k.heads * k.head_size for k in self.attention)

    @property
    def output_bytes_per_token(self) -> int:
        """Bytes of one token's attention output, all layers: as q, or what is latent of it."""
        return self.bytes_per_element * sum(k.count * k.heads * k.value_size for k in self.attention)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's k and v in all layers that keep them: 2 e d L / G, or of latent rows."""
        return self._key_value_bytes(lambda kind: kind.stores)

    @property
    def read_bytes_per_token(self) -> int:
        """Bytes of k and v that attention reads of one cached token if all layers see it."""
        return self._key_value_bytes(lambda kind: True)

    def _key_value_bytes(self, counts: Callable[[AttentionLayers], bool]) -> int:
        kinds = (kind for kind in self.attention if counts(kind))
        return self.bytes_per_element * sum(kind.count * kind.kept_elements for kind in kinds)

    @cached_property
    def kept(self) -> Reach:
        """What a request keeps in the KV cache, in tokens of `kv_bytes_per_token`."""
        return self._reach(lambda kind: kind.stores)

    @cached_property
    def read(self) -> Reach:
        """What a token's attention reads, in tokens of `read_bytes_per_token`."""
        return self._reach(lambda kind: True)

    def _reach(self, counts: Callable[[AttentionLayers], bool]) -> Reach:
        total = self._key_value_bytes(counts)

        def share(window: int) -> float:
            return self._key_value_bytes(lambda kind: counts(kind) and kind.window == window) / total

        windows = sorted({kind.window for kind in self.attention if counts(kind) and kind.window})
        return Reach(share(0), tuple((window, share(window)) for window in windows))

    @property
    def wire_bytes_per_token(self) -> int:
        """Bytes that one token's decode step moves: ``(2 + 2/G) e d L`` (arXiv 2405.01814, section 3)."""
        return self.query_bytes_per_token + self.output_bytes_per_token + self.kv_bytes_per_token

    @property
    def attention_flops_per_cached_token(self) -> int:
        """FLOP of one query token against one cached token, all layers: a product with k and one with v."""
        return sum(
            2 * kind.count * kind.heads * (kind.head_size + kind.value_size) for kind in self.attention
        )

    def prompt_attention_flops(self, chunk: float, context: float) -> float:
        """FLOP of attention of a chunk of prompt tokens over ``context`` earlier ones and, causally, itself.

        For it keys and values are expanded where they are latent.
        """
        seen = context + chunk / 2.0
        return sum(
            2
            * kind.count
            * kind.heads
            * (kind.expanded_size or 2 * kind.head_size)
            * chunk
            * min(seen, kind.window or seen)
            for kind in self.attention
        )

    @property
    def key_value_projection_share(self) -> float:
        """Fraction of the active parameters that project to what is kept of a token."""
        return self.hidden * self.kv_bytes_per_token / self.bytes_per_element / self.active_params
