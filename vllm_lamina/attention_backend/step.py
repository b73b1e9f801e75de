"""One step of one lane as the attention workers are told of it: what the scheduler says, in the order of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_lamina.device.base import Chunks
from vllm_lamina.errors import LaminaError

if TYPE_CHECKING:
    import torch

    from vllm_lamina._native import AttentionClient, StreamedExchange
    from vllm_lamina.kv_cache.geometry import Geometry, Group


class PlannedRequest(NamedTuple):
    """One request's part of a step.

    ``context_len`` tokens are in the KV cache, ``query_len`` are new; ``block_ids``, int32 for each group of layers,
    hold at least both.
    """

    context_len: int
    query_len: int
    block_ids: tuple[npt.NDArray[np.int32], ...]


@dataclass(frozen=True)
class StepPlan:
    """A step before the model runner has prepared it: the parts of its requests, by their names.

    ``order`` returns the names in the order of the runner's batch; it is asked once the runner has prepared the step.
    """

    requests: Mapping[str, PlannedRequest]
    order: Callable[[], Sequence[str]]


class ContextRows(NamedTuple):
    """Query tokens of one prefill chunk that see context in the layers of a group.

    ``start`` is their first row among those of all chunks, ``context_start`` the first among those that the attention
    workers return.
    """

    start: int
    context_start: int
    num_rows: int


class StepGroup:
    """What the layers of one group have of a step.

    Attributes
    ----------
    block_table
        [requests, blocks of the longest], int32; 0 behind a request's last block.
    slot_mapping
        [num_tokens], int64: where in the KV cache each token goes, block id * block size + offset.
    context_rows
        Of each prefill chunk that sees context, in order.
    num_context_rows
        Query tokens of all of these.
    """

    def __init__(self, step: Step, block_ids: Sequence[npt.NDArray[np.int32]], group: Group) -> None:
        size = group.block_size
        widths = -(-(step.query_lens + step.context_lens) // size)
        self.block_table = np.zeros((len(block_ids), widths.max()), np.int32)
        for row, ids, width in zip(self.block_table, block_ids, widths, strict=True):
            row[:width] = ids[:width]
        blocks = self.block_table[step.requests, step.positions // size].astype(np.int64)
        self.slot_mapping = blocks * size + step.positions % size
        self.context_rows: list[ContextRows] = []
        self.num_context_rows = start = 0
        for i in range(step.num_decodes, len(block_ids)):
            query_len = int(step.query_lens[i])
            count = group.context_rows(int(step.context_lens[i]), query_len)
            if count:
                self.context_rows.append(ContextRows(start, self.num_context_rows, count))
            self.num_context_rows += count
            start += query_len


class Step:
    """A step in the order of the runner's batch: the decodes first, one token each, then the prefill chunks.

    Everything of it comes from the scheduler's output, so no tensor of the runner is read, and how a batch is padded
    does not matter.

    Attributes
    ----------
    geometry
        Of the model's layers.
    query_lens, context_lens
        [requests], int32.
    requests, positions
        [num_tokens]: which request each token is of, and its place there.
    num_tokens
        Query tokens of all requests.
    num_decodes
        Requests at the head of the batch with one query token and context.
    first_chunk_token
        The rest of the batch are prefill chunks, whose rows follow one another from here on.
    chunks
        These as the local attention takes them: its rows are counted from the first chunk's first.
    groups
        What differs from group to group of layers.
    kept
        By group and position, k and v of the chunks in a layer that others share: they attend them too.
    """

    def __init__(self, plan: StepPlan, geometry: Geometry) -> None:
        parts = [plan.requests[name] for name in plan.order()]
        self.geometry = geometry
        self.query_lens = np.array([part.query_len for part in parts], np.int32)
        self.context_lens = np.array([part.context_len for part in parts], np.int32)
        starts = np.concatenate(([0], np.cumsum(self.query_lens)))
        self.num_tokens = int(starts[-1])
        self.requests = np.repeat(np.arange(len(parts)), self.query_lens)
        self.positions = np.arange(self.num_tokens) - starts[self.requests] + self.context_lens[self.requests]
        decodes = (self.query_lens == 1) & (self.context_lens > 0)
        self.num_decodes = len(parts) if decodes.all() else int(np.argmin(decodes))
        self.first_chunk_token = int(starts[self.num_decodes])
        self.chunks = Chunks(self.query_lens[self.num_decodes :], self.context_lens[self.num_decodes :])
        self.groups = [
            StepGroup(self, [part.block_ids[number] for part in parts], group)
            for number, group in enumerate(geometry.groups)
        ]
        self.kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._is_sent = False

    @property
    def has_chunks(self) -> bool:
        """Whether there are prefill chunks."""
        return self.first_chunk_token < self.num_tokens

    def spans(self, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> list[tuple[int, int]]:
        """The parts of requests that see each other whole, as rows [first, end) of the chunks; their order is that of
        the batch.

        Parameters
        ----------
        ranges
            Of requests, by their place in the batch: positions, the last one included.

        Raises
        ------
        LaminaError
            A chunk ends within one. The scheduler makes no such step, see `SchedulerPort`.
        """
        spans = []
        for request in range(self.num_decodes, len(self.query_lens)):
            context, length = int(self.context_lens[request]), int(self.query_lens[request])
            row = int(self.chunks.starts[request - self.num_decodes])
            for first, last in ranges.get(request, ()):
                if first < context + length <= last:
                    raise LaminaError(
                        f"Tokens {first} to {last} of a request see each other whole, and a step of it ends before "
                        f"token {context + length}."
                    )
                if context < last < context + length:
                    spans.append((row + max(first - context, 0), row + last + 1 - context))
        return spans

    def group_of(self, layer: int) -> StepGroup:
        """The group of a layer."""
        return self.groups[self.geometry.layers[layer].group]

    def rows_of_workers(self, layer: int) -> list[slice]:
        """Query tokens of which the attention workers get q in a layer: the decodes, and those that see context."""
        rows = [slice(self.first_chunk_token)] if self.num_decodes else []
        for start, _, count in self.group_of(layer).context_rows:
            begin = self.first_chunk_token + start
            rows.append(slice(begin, begin + count))
        return rows

    def keep(
        self, layer: int, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunks' k and v that a layer attends: its own, kept for those that share them, or those that it shares.

        Parameters
        ----------
        key, value
            [num_tokens, num_kv_heads, head size]; not read where the layer does not store.
        """
        spec = self.geometry.layers[layer]
        place = (spec.group, spec.position)
        if not spec.stores:
            return self.kept[place]
        assert key is not None
        assert value is not None
        chunks = slice(self.first_chunk_token, self.num_tokens)
        k, v = key[chunks], value[chunks]
        if place in self.geometry.shared_places:
            # The model may use their memory for something else.
            self.kept[place] = k.clone(), v.clone()
        return k, v

    def send_once(self, client: AttentionClient | StreamedExchange, lane: int, timeout: float) -> bool:
        """Tell the attention workers, before the step's first exchange; later calls do nothing, and return False."""
        if self._is_sent:
            return False
        self._is_sent = True
        client.begin_step(
            lane,
            self.num_decodes,
            self.query_lens,
            self.context_lens,
            [(group.block_table, group.slot_mapping) for group in self.groups],
            timeout,
        )
        return True
