"""Logits processors of a user's own, as vLLM loads them by their names: ``logits_processors:NoRepeats``."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class NoRepeats(AdapterLogitsProcessor):
    """Forbids the last `extra_args["no_repeats"]` output tokens of a request, and makes every second of the tokens from
    a number on, that of its output tokens, less likely: what it does depends on the state of the request.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        window = (params.extra_args or {}).get("no_repeats")
        if window is None:
            return None

        def forbid(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[output_ids[-window:]] = float("-inf")
            logits[len(output_ids) :: 2] -= 1.0
            return logits

        return forbid


class EveryNth(AdapterLogitsProcessor):
    """Lets a request give one token at every call whose number `extra_args["every"]` divides: it counts them itself."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        every = (params.extra_args or {}).get("every")
        if every is None:
            return None
        calls = 0

        def choose(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls % every == 0:
                logits[:] = float("-inf")
                logits[50] = 0.0
            return logits

        return choose
