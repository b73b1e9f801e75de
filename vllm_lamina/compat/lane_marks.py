"""Which lane a step is of, marked on the scheduler's output on its way to the model worker."""

from __future__ import annotations

from typing import Any


def mark_lane(output: Any, lane: int | None) -> None:
    """Mark a ``SchedulerOutput``; None for one without a step."""
    output.lamina_lane = lane


def lane_of(output: Any) -> int:
    """The lane of a ``SchedulerOutput`` that has tokens to compute."""
    lane: int = getattr(output, "lamina_lane", 0)
    return lane
