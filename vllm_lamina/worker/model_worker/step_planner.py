"""Keeps the KV blocks of the requests that run, and plans each step from what the scheduler says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_lamina.attention_backend.step import PlannedRequest
from vllm_lamina.compat.scheduled import ScheduledStep


@dataclass(frozen=True)
class KVGroups:
    """The part of vLLM's groups and block ids that is the attention workers': the rest holds states.

    ``numbers`` are those of the groups whose layers have k and v; ``first_block`` is their first block's id.
    """

    numbers: tuple[int, ...]
    first_block: int


class StepPlanner:
    """The requests' blocks as of the step planned last, for each group of layers that has k and v.

    Steps are planned in the order in which they were scheduled, for all lanes.
    """

    def __init__(self, groups: KVGroups) -> None:
        self._groups = groups
        self._block_ids: dict[str, tuple[npt.NDArray[np.int32], ...]] = {}

    def plan(self, step: ScheduledStep) -> dict[str, PlannedRequest]:
        """The parts of a step's requests; what is returned does not change with later steps."""
        for name in step.finished:
            self._block_ids.pop(name, None)
        planned = {}
        for request in step.requests:
            ids = self._kv_blocks(request.block_ids)
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

    def _kv_blocks(self, block_ids: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int32], ...]:
        """Of vLLM's ids by group those that are sent; nothing is read of its null block, which may come out below 0."""
        first = self._groups.first_block
        return tuple(np.array(block_ids[n], np.int32) - first for n in self._groups.numbers if block_ids)
