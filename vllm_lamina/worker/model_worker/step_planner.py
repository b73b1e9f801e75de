"""Keeps the KV blocks of the requests that run, and plans each step from the scheduler's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vllm_lamina.attention_backend.step import PlannedRequest
from vllm_lamina.compat.scheduled import scheduled_requests

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class StepPlanner:
    """The requests' blocks as of the step planned last, by vLLM's block ids.

    Steps are planned in the order in which they were scheduled, for all lanes.
    """

    def __init__(self) -> None:
        self._block_ids: dict[str, npt.NDArray[np.int32]] = {}

    def plan(self, output: SchedulerOutput) -> dict[str, PlannedRequest]:
        """The parts of a step's requests; what is returned does not change with later steps."""
        for name in output.finished_req_ids:
            self._block_ids.pop(name, None)
        planned = {}
        for request in scheduled_requests(output):
            if request.is_anew:
                self._block_ids[request.name] = np.array(request.block_ids, np.int32)
            elif request.block_ids:
                further = np.array(request.block_ids, np.int32)
                self._block_ids[request.name] = np.concatenate((self._block_ids[request.name], further))
            block_ids = self._block_ids[request.name]
            planned[request.name] = PlannedRequest(request.context_len, request.query_len, block_ids)
        return planned
