"""What the kernels of the exchange read of a lane's steps: tables on the device, which the host fills before each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vllm_lamina.config import HEAD
from vllm_lamina.device.frame_descriptor import FrameDescriptor, Heads

if TYPE_CHECKING:
    from vllm_lamina._native import StreamedExchange
    from vllm_lamina.attention_backend.step import Step
    from vllm_lamina.device.base import Streams
    from vllm_lamina.kv_cache.geometry import CacheSpec
    from vllm_lamina.kv_cache.partition import Partition

FRAMES = 2
"""Places for the frames of a lane: layers take them in turn (``kFrames``)."""


class Layout(NamedTuple):
    """What layers have in common whose frames and replies are laid out alike."""

    group: int
    cache: int
    num_heads: int
    stores: bool


@dataclass(eq=False)
class Frames:
    """Frames and replies of the layers of one layout. Tensors are on the device.

    Attributes
    ----------
    cache
        What a layer keeps of a token.
    heads
        By worker, which it has.
    head_ranges
        [workers, 2], int32: the first of its query heads, and how many.
    q_tokens, kv_tokens
        [workers, max_tokens], int32: tokens of the step whose q, and whose k and v, the worker gets.
    index
        [workers, max_tokens], int32: the tokens' rows in the worker's reply; -1 for none.
    descriptors
        [FRAMES, workers, fields], int64: each a `FrameDescriptor`.
    rows
        By worker, in the step that is prepared: rows of q, and of k and v.
    is_answered
        Whether any worker answers a layer of that step.
    is_answered_by_all
        Whether each worker does that gets a frame: then the replies say that the frames' place is free again.
    """

    layout: Layout
    cache: CacheSpec
    heads: Sequence[Heads]
    head_ranges: torch.Tensor
    q_tokens: torch.Tensor
    kv_tokens: torch.Tensor
    index: torch.Tensor
    descriptors: torch.Tensor
    rows: Sequence[tuple[int, int]] = ()
    is_answered: bool = False
    is_answered_by_all: bool = False

    def set_rows(self, rows: Sequence[tuple[int, int]]) -> None:
        """Of the step that is prepared."""
        self.rows = rows
        self.is_answered = any(num_q for num_q, _ in rows)
        self.is_answered_by_all = all(num_q or not num_kv for num_q, num_kv in rows)

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Of k and of v."""
        return self.cache.head_size, self.cache.head_size_v

    @property
    def dtype(self) -> Any:
        """Of all rows."""
        return getattr(torch, self.cache.dtype)


class FrameTables:
    """The tables of one lane.

    Attributes
    ----------
    frames
        Of each layer; layers of one layout have the same.
    sinks
        Of each layer, [heads] float32 on the device; None where it has none, or the workers count them.
    replies
        [workers], int64, in the host's memory: where their replies lie.
    """

    def __init__(
        self, exchange: StreamedExchange, lane: int, streams: Streams, partition: Partition, max_tokens: int
    ) -> None:
        self._exchange, self._lane, self._streams = exchange, lane, streams
        geometry = partition.geometry
        self._num_workers, self._num_groups = len(partition.shares), geometry.num_groups
        # Of each group, by worker: q tokens, kv tokens, and the tokens' rows in the reply; then, which are in chunks.
        num_rows = 3 * self._num_workers * self._num_groups + 1
        self._tables, self._tables_on_host = streams.tensor((num_rows, max_tokens), torch.int32)
        layouts = [Layout(spec.group, spec.cache, spec.num_heads, spec.stores) for spec in geometry.layers]
        self._layouts = list(dict.fromkeys(layouts))
        shape = (len(self._layouts), FRAMES, self._num_workers, len(FrameDescriptor._fields))
        self._descriptors, self._descriptors_on_host = streams.tensor(shape, torch.int64)
        self._by_layout = [self._frames_of(layout, partition) for layout in self._layouts]
        self.frames = [self._by_layout[self._layouts.index(layout)] for layout in layouts]
        # Where a decode is attended by several workers, who merges their parts counts its sink.
        merges = self._num_workers > 1 and partition.kind != HEAD
        self.sinks = [
            self._constant(spec.sinks, torch.float32) if merges and spec.sinks else None
            for spec in geometry.layers
        ]
        *_, replies = exchange.words(lane)
        self.replies = torch.frombuffer(
            (ctypes.c_int64 * self._num_workers).from_address(replies), dtype=torch.int64
        )
        self.find_frames()

    @property
    def is_in_chunk(self) -> torch.Tensor:
        """[max_tokens], int32, on the device: whether a token of the step is in a prefill chunk."""
        return self._tables[-1]

    def find_frames(self) -> None:
        """Ask where the frames' payloads are."""
        self._payloads = [
            [self._exchange.payload(self._lane, worker, place) for worker in range(self._num_workers)]
            for place in range(FRAMES)
        ]

    def fill(self, step: Step) -> None:
        """With the step. The lane's step before is over, so nobody reads the old tables; `copy` brings the new ones."""
        tables = self._by_group()
        tables[:, 2] = -1  # also of the rows with which a captured step is padded
        parts = []
        for group, (q_table, kv_table, index) in enumerate(tables):
            parts.append(
                [self._exchange.part(self._lane, worker, group) for worker in range(self._num_workers)]
            )
            for worker, (q_tokens, kv_tokens, _) in enumerate(parts[-1]):
                q_table[worker, : len(q_tokens)] = q_tokens
                kv_table[worker, : len(kv_tokens)] = kv_tokens
                index[worker, q_tokens] = np.arange(len(q_tokens))
        for frames, descriptors in zip(self._by_layout, self._descriptors_on_host, strict=True):
            its_parts = parts[frames.layout.group]
            frames.set_rows(
                [(len(part[0]), len(part[1]) if frames.layout.stores else 0) for part in its_parts]
            )
            for worker, ((num_q, num_kv), part) in enumerate(zip(frames.rows, its_parts, strict=True)):
                for place, payloads in enumerate(self._payloads):
                    FrameDescriptor.of(
                        payloads[worker],
                        num_q,
                        num_kv,
                        part[2],
                        frames.heads[worker],
                        frames.head_sizes,
                        frames.dtype,
                    ).write(descriptors[place, worker])
        in_chunk = np.arange(step.num_tokens) >= step.first_chunk_token
        self._tables_on_host.numpy()[-1, : step.num_tokens] = in_chunk

    def fill_with_nothing(self) -> None:
        """Let layers run without a step: nothing is packed or taken."""
        self._by_group()[:, 2] = -1
        self._descriptors_on_host.zero_()
        self.replies.zero_()

    def copy(self) -> None:
        """Enqueue: what was filled goes to the device."""
        self._tables.copy_(self._tables_on_host, non_blocking=True)
        self._descriptors.copy_(self._descriptors_on_host, non_blocking=True)

    def _by_group(self) -> Any:
        """[groups, 3, workers, max_tokens], the host's."""
        tables = self._tables_on_host.numpy()
        return tables[:-1].reshape(self._num_groups, 3, self._num_workers, tables.shape[1])

    def _frames_of(self, layout: Layout, partition: Partition) -> Frames:
        heads = _heads(partition, layout)
        ranges = self._constant([(share.first_q, share.num_q) for share in heads], torch.int32)
        tables = self._tables[3 * self._num_workers * layout.group :][: 3 * self._num_workers]
        q_tokens, kv_tokens, index = tables.chunk(3)
        descriptors = self._descriptors[self._layouts.index(layout)]
        cache = partition.geometry.caches[layout.cache]
        return Frames(layout, cache, heads, ranges, q_tokens, kv_tokens, index, descriptors)

    def _constant(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        """On the device."""
        tensor = torch.tensor(values, dtype=dtype)
        on_device, on_host = self._streams.tensor(tensor.shape, dtype)
        on_host.copy_(tensor)
        on_device.copy_(on_host)
        return on_device


def _heads(partition: Partition, layout: Layout) -> Sequence[Heads]:
    """What each worker has of a layer's heads: of some, or each of all."""
    cache = partition.geometry.caches[layout.cache]
    group = layout.num_heads // cache.num_kv_heads
    heads, first = [], 0
    for share in partition.shares:
        count = share.geometry.caches[layout.cache].num_kv_heads
        heads.append(Heads(first * group, count * group, first, count))
        if count < cache.num_kv_heads:
            first += count
    return heads
