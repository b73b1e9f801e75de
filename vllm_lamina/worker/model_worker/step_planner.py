"""Keeps the KV blocks of the requests that run, and plans each step from what the scheduler says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_lamina.attention_backend.step import PlannedRequest
from vllm_lamina.compat.scheduled import ScheduledStep


class StepPlanner:
    """The requests' blocks as of the step planned last, by vLLM's block ids, for each group of layers that keeps KV.

    Steps are planned in the order in which they were scheduled, for all lanes.

    Parameters
    ----------
    kv_groups
        Numbers of these groups, of all of vLLM's: the others keep states.
    """

    def __init__(self, kv_groups: Sequence[int]) -> None:
        self._kv_groups = kv_groups
        self._block_ids: dict[str, tuple[npt.NDArray[np.int32], ...]] = {}

    def plan(self, step: ScheduledStep) -> dict[str, PlannedRequest]:
        """The parts of a step's requests; what is returned does not change with later steps."""
        for name in step.finished:
            self._block_ids.pop(name, None)
        planned = {}
        for request in step.requests:
            by_group = request.block_ids
            ids = tuple(np.array(by_group[n], np.int32) for n in self._kv_groups) if by_group else ()
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
