"""Keeps the KV blocks of the requests that run, and plans each step from what the scheduler says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_lamina.attention_backend.step import PlannedRequest
from vllm_lamina.compat.scheduled import ScheduledStep


class StepPlanner:
    """The requests' blocks as of the step planned last, by vLLM's block ids, for each group of layers.

    Steps are planned in the order in which they were scheduled, for all lanes.
    """

    def __init__(self) -> None:
        self._block_ids: dict[str, tuple[npt.NDArray[np.int32], ...]] = {}

    def plan(self, step: ScheduledStep) -> dict[str, PlannedRequest]:
        """The parts of a step's requests; what is returned does not change with later steps."""
        for name in step.finished:
            self._block_ids.pop(name, None)
        planned = {}
        for request in step.requests:
            ids = tuple(np.array(ids, np.int32) for ids in request.block_ids)
            if request.has_new_blocks:
                self._block_ids[request.name] = ids
            elif ids:
                held = self._block_ids[request.name]
                self._block_ids[request.name] = tuple(
                    np.concatenate(pair) if len(pair[1]) else pair[0] for pair in zip(held, ids, strict=True)
                )
            block_ids = self._block_ids[request.name]
            planned[request.name] = PlannedRequest(request.context_len, request.query_len, block_ids)
        return planned
