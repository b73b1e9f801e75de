"""A user's logits processor, for each model runner, as vLLM loads it by its name: ``logits_processors:NoRepeatsV1``.

It forbids the last `extra_args["no_repeats"]` output tokens of a request, and makes every second of the tokens from a
number on, that of its output tokens, less likely: what it does depends on the state of the request.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor


def window_of(params: Any) -> int | None:
    window: int | None = (params.extra_args or {}).get("no_repeats")
    return window


def forbid(output_ids: list[int], window: int, logits: torch.Tensor) -> None:
    """Of one request; ``logits`` are its row."""
    logits[output_ids[-window:]] = float("-inf")
    logits[len(output_ids) :: 2] -= 1.0


class NoRepeatsV1(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        window = window_of(params)
        if window is None:
            return None

        def processor(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            forbid(output_ids, window, logits)
            return logits

        return processor


class NoRepeatsV2(LogitsProcessor):
    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._states = req_states
        self._windows: list[int | None] = [None] * req_states.max_num_reqs

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._windows[req_idx] = window_of(sampling_params)
        return self._windows[req_idx] is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        for row, slot in zip(logits, ctx.expanded_idx_mapping.tolist(), strict=True):
            window = self._windows[slot]
            if window is not None:
                output = slice(int(self._states.prompt_len.np[slot]), int(self._states.total_len.gpu[slot]))
                forbid(self._states.all_token_ids.gpu[slot, output].tolist(), window, row)
        return logits
