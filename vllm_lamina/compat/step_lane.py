"""The lane of a step, carried from the scheduler to the model worker with vLLM's ``SchedulerOutput``."""

from __future__ import annotations

from typing import Any


def mark_lane(output: Any, lane: int | None) -> None:
    """Attach the index of the lane whose step this is; None for a step without tokens."""
    output.lamina_lane = lane


def lane_of(output: Any) -> int:
    """The index of the lane whose step this is, which has tokens."""
    lane: int = output.lamina_lane
    return lane
