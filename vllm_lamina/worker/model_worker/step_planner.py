"""Keeps the KV blocks of the requests that run, and plans each step from what the scheduler says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_lamina.attention_backend.step import PlannedRequest
from vllm_lamina.compat.scheduled import ScheduledStep


class StepPlanner:
    """The requests' blocks as of the step planned last, by vLLM's block ids.

    Steps are planned in the order in which they were scheduled, for all lanes.
    """

    def __init__(self) -> None:
        self._block_ids: dict[str, npt.NDArray[np.int32]] = {}

    def plan(self, step: ScheduledStep) -> dict[str, PlannedRequest]:
        """The parts of a step's requests; what is returned does not change with later steps."""
        for name in step.finished:
            self._block_ids.pop(name, None)
        planned = {}
        for request in step.requests:
            if request.has_new_blocks:
                self._block_ids[request.name] = np.array(request.block_ids, np.int32)
            elif request.block_ids:
                further = np.array(request.block_ids, np.int32)
                self._block_ids[request.name] = np.concatenate((self._block_ids[request.name], further))
            block_ids = self._block_ids[request.name]
            planned[request.name] = PlannedRequest(request.context_len, request.query_len, block_ids)
        return planned
