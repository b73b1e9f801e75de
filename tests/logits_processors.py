"""A user's logits processors, each for both model runners, as vLLM loads them: ``logits_processors:NoRepeatsV1``.

`NoRepeats` forbids the last `extra_args["no_repeats"]` output tokens of a request, and makes every second of the tokens
from a number on, that of its output tokens, less likely: it depends on the state of the request. `EveryNth` lets a
request give one token at every call whose number `extra_args["every"]` divides: it counts them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

Change = Callable[[list[int], torch.Tensor], None]
"""Changes the logits of a request, [vocabulary], by its output tokens."""


def no_repeats(params: Any) -> Change | None:
    window = (params.extra_args or {}).get("no_repeats")

    def change(output_ids: list[int], logits: torch.Tensor) -> None:
        logits[output_ids[-window:]] = float("-inf")
        logits[len(output_ids) :: 2] -= 1.0

    return None if window is None else change


def every_nth(params: Any) -> Change | None:
    every = (params.extra_args or {}).get("every")
    calls = 0

    def change(output_ids: list[int], logits: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            logits[:] = float("-inf")
            logits[50] = 0.0

    return None if every is None else change


class _ProcessorV1(AdapterLogitsProcessor):
    make: Callable[[Any], Change | None]

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        change = type(self).make(params)
        if change is None:
            return None

        def processor(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            change(output_ids, logits)
            return logits

        return processor


class _ProcessorV2(LogitsProcessor):
    make: Callable[[Any], Change | None]

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states = req_states
        self._changes: list[Change | None] = [None] * req_states.max_num_reqs

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._changes[req_idx] = type(self).make(sampling_params)
        return self._changes[req_idx] is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        for row, place in zip(logits, ctx.expanded_idx_mapping.tolist(), strict=True):
            change = self._changes[place]
            if change is not None:
                output = slice(int(self._states.prompt_len.np[place]), int(self._states.total_len.gpu[place]))
                change(self._states.all_token_ids.gpu[place, output].tolist(), row)
        return logits


class NoRepeatsV1(_ProcessorV1):
    make = staticmethod(no_repeats)


class NoRepeatsV2(_ProcessorV2):
    make = staticmethod(no_repeats)


class EveryNthV1(_ProcessorV1):
    make = staticmethod(every_nth)


class EveryNthV2(_ProcessorV2):
    make = staticmethod(every_nth)
