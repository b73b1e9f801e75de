"""One step of one lane as the attention workers are told of it: what the scheduler says, in the order of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_lamina.device.base import Chunks

if TYPE_CHECKING:
    from vllm_lamina._native import AttentionClient, StreamedExchange


class PlannedRequest(NamedTuple):
    """One request's part of a step.

    ``context_len`` tokens are in the KV cache, ``query_len`` are new; ``block_ids``, int32, hold at least both.
    """

    context_len: int
    query_len: int
    block_ids: npt.NDArray[np.int32]


@dataclass(frozen=True)
class StepPlan:
    """A step before the model runner has prepared it: the parts of its requests, by their names.

    ``order`` returns the names in the order of the runner's batch; it is asked once the runner has prepared the step.
    """

    requests: Mapping[str, PlannedRequest]
    order: Callable[[], Sequence[str]]


@dataclass(frozen=True)
class PrefillChunk:
    """Query tokens of one request that attend among themselves on the model worker.

    ``context_start`` is the first of the chunk's rows in what the attention worker returns for the context, or None
    where the request has no context.
    """

    start: int
    end: int
    context_start: int | None


class Step:
    """A step in the order of the runner's batch: the decodes first, one token each, then the prefill chunks.

    Everything of it comes from the scheduler's output, so no tensor of the runner is read, and how a batch is padded
    does not matter.

    Attributes
    ----------
    query_lens, context_lens
        [requests], int32.
    block_table
        [requests, blocks of the longest], int32; 0 behind a request's last block.
    slot_mapping
        [num_tokens], int64: where in the KV cache each token goes, block id * block size + offset.
    num_tokens
        Query tokens of all requests.
    num_decodes
        Requests at the head of the batch with one query token and context.
    prefill_chunks
        The rest of the batch; the rows of all follow one another, from ``first_chunk_token`` up to its end.
    chunks
        The same as the local attention takes them: its rows are counted from the first chunk's first.
    num_context_rows
        Query tokens of prefill chunks that have context.
    """

    def __init__(self, plan: StepPlan, block_size: int) -> None:
        parts = [plan.requests[name] for name in plan.order()]
        self.query_lens = np.array([part.query_len for part in parts], np.int32)
        self.context_lens = np.array([part.context_len for part in parts], np.int32)
        widths = -(-(self.query_lens + self.context_lens) // block_size)
        self.block_table = np.zeros((len(parts), widths.max()), np.int32)
        for row, part, width in zip(self.block_table, parts, widths, strict=True):
            row[:width] = part.block_ids[:width]
        starts = np.concatenate(([0], np.cumsum(self.query_lens)))
        self.num_tokens = int(starts[-1])
        requests = np.repeat(np.arange(len(parts)), self.query_lens)
        positions = np.arange(self.num_tokens) - starts[requests] + self.context_lens[requests]
        blocks = self.block_table[requests, positions // block_size].astype(np.int64)
        self.slot_mapping = blocks * block_size + positions % block_size
        decodes = (self.query_lens == 1) & (self.context_lens > 0)
        self.num_decodes = len(parts) if decodes.all() else int(np.argmin(decodes))
        chunks = range(self.num_decodes, len(parts))
        self.num_context_rows = sum(parts[i].query_len for i in chunks if parts[i].context_len)
        self.first_chunk_token = int(starts[self.num_decodes])
        self.prefill_chunks = tuple(_prefill_chunks(parts[self.num_decodes :], self.first_chunk_token))
        self.chunks = Chunks(self.query_lens[self.num_decodes :], self.context_lens[self.num_decodes :])
        self._is_sent = False

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
            self.block_table,
            self.slot_mapping,
            timeout,
        )
        return True


def _prefill_chunks(parts: Sequence[PlannedRequest], start: int) -> Iterator[PrefillChunk]:
    context_row = 0
    for part in parts:
        end = start + part.query_len
        if part.context_len == 0:
            yield PrefillChunk(start, end, None)
        else:
            yield PrefillChunk(start, end, context_row)
            context_row += part.query_len
        start = end
