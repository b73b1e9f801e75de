"""What vLLM's scheduler says of a step to the model worker: the one place that reads its ``SchedulerOutput``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from vllm_lamina.compat.step_lane import lane_of


class ScheduledRequest(NamedTuple):
    """One request of a step.

    ``context_len`` tokens were computed before, ``query_len`` are computed now. ``block_ids``, by group of layers,
    follow those that the request has, or are all of its blocks where ``has_new_blocks``; empty where none are added.
    ``is_new`` where no model runner knows it.
    """

    name: str
    context_len: int
    query_len: int
    block_ids: Sequence[Sequence[int]]
    has_new_blocks: bool
    is_new: bool


@dataclass(frozen=True)
class ScheduledStep:
    """A step, in the order of the scheduler's output; the model runner's batch has an order of its own.

    Attributes
    ----------
    lane
        Of the step, if there are tokens.
    num_tokens
        Of all requests; 0 for an output that only tells of requests that have finished.
    finished, preempted
        Requests that have finished, and those that were preempted, since the output before.
    adapters
        LoRA adapters to load anew before the step; vLLM's own runner would in each step of their requests.
    blocks_to_zero, blocks_to_copy
        Ids of KV blocks, and pairs (source, destination) of them, before the step.
    inputs_to_forget
        Hashes of multimodal inputs whose encoder outputs are to be forgotten before the step.
    """

    lane: int
    num_tokens: int
    requests: Sequence[ScheduledRequest]
    finished: Set[str]
    preempted: Set[str]
    adapters: Sequence[Any]
    blocks_to_zero: Sequence[int]
    blocks_to_copy: Sequence[Any]
    inputs_to_forget: Sequence[str]
    _output: Any

    def for_runner(self, finished: set[str], inputs_to_forget: Set[str]) -> Any:
        """The ``SchedulerOutput`` for a model runner that is to forget these requests and inputs, and no others."""
        return dataclasses.replace(
            self._output,
            finished_req_ids=finished,
            free_encoder_mm_hashes=list(inputs_to_forget),
            preempted_req_ids=None,
            new_block_ids_to_zero=None,
            kv_cache_block_copies=None,
        )


def read_step(output: Any) -> ScheduledStep:
    """Read a ``SchedulerOutput``; the adapters that it would have loaded in place are the reader's from now on."""
    adapters = []
    for new in output.scheduled_new_reqs:
        if new.lora_request is not None and new.lora_request.load_inplace:
            adapters.append(new.lora_request)
            new.lora_request = msgspec.structs.replace(new.lora_request, load_inplace=False)
    return ScheduledStep(
        lane=lane_of(output) if output.total_num_scheduled_tokens else 0,
        num_tokens=output.total_num_scheduled_tokens,
        requests=tuple(_requests(output)),
        finished=output.finished_req_ids,
        preempted=output.preempted_req_ids or frozenset(),
        adapters=adapters,
        blocks_to_zero=output.new_block_ids_to_zero or (),
        blocks_to_copy=output.kv_cache_block_copies or (),
        inputs_to_forget=output.free_encoder_mm_hashes,
        _output=output,
    )


def has_work(output: Any) -> bool:
    """Whether a ``SchedulerOutput`` holds anything for the model worker."""
    return bool(
        output.total_num_scheduled_tokens
        or output.finished_req_ids
        or output.preempted_req_ids
        or output.free_encoder_mm_hashes
    )


def keep_grammar(grammar_output: Any) -> Any:
    """A ``GrammarOutput`` that stays as it is: in the engine's own process its bitmask is a view of a buffer that the
    next step of any lane overwrites.
    """
    if grammar_output is None or grammar_output.grammar_bitmask is None:
        return grammar_output
    kept = copy.copy(grammar_output)
    kept.grammar_bitmask = grammar_output.grammar_bitmask.copy()
    return kept


def _requests(output: Any) -> Iterator[ScheduledRequest]:
    query_lens = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        yield ScheduledRequest(
            new.req_id, new.num_computed_tokens, query_lens[new.req_id], new.block_ids, True, True
        )
    cached = output.scheduled_cached_reqs
    for name, context_len, blocks in zip(
        cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
    ):
        resumed = name in cached.resumed_req_ids
        yield ScheduledRequest(name, context_len, query_lens[name], blocks or (), resumed, False)
