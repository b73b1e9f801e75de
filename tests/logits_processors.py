"""A logits processor of a user's own, as vLLM loads it by its name: ``logits_processors:NoRepeats``."""

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
