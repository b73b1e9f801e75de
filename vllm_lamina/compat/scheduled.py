"""What vLLM's scheduler says of a step to the model worker: the one place that reads its ``SchedulerOutput``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput


class ScheduledRequest(NamedTuple):
    """One request of a step.

    ``context_len`` tokens were computed before, ``query_len`` are computed now. ``block_ids`` follow those that the
    request has, or are all of its blocks where ``is_anew``.
    """

    name: str
    context_len: int
    query_len: int
    block_ids: Sequence[int]
    is_anew: bool


def scheduled_requests(output: SchedulerOutput) -> Iterator[ScheduledRequest]:
    """The requests of a step, in no particular order. There is one KV cache group."""
    query_lens = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        [block_ids] = new.block_ids
        yield ScheduledRequest(new.req_id, new.num_computed_tokens, query_lens[new.req_id], block_ids, True)
    cached = output.scheduled_cached_reqs
    for name, context_len, blocks in zip(
        cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
    ):
        [block_ids] = blocks if blocks is not None else [()]
        yield ScheduledRequest(name, context_len, query_lens[name], block_ids, name in cached.resumed_req_ids)


def take_block_operations(
    output: SchedulerOutput,
) -> tuple[SchedulerOutput, Sequence[int], Sequence[Any]]:
    """Take out what vLLM would do to KV blocks itself.

    Returns
    -------
    tuple
        The output without them, the ids of blocks to zero, and pairs (source, destination) of blocks to copy.
    """
    zero, copies = output.new_block_ids_to_zero or (), output.kv_cache_block_copies or ()
    if zero or copies:
        output = copy.copy(output)  # with the lane, which is no field of it
        output.new_block_ids_to_zero = output.kv_cache_block_copies = None
    return output, zero, copies
