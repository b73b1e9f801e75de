"""How long a step took on either side, carried to the scheduler with vLLM's output of the step."""

from __future__ import annotations

from typing import Any, NamedTuple


class StepTimes(NamedTuple):
    """Seconds of one step: on the model worker without its waiting, and on the attention worker."""

    model: float
    attention: float


def report_times(output: Any, times: StepTimes) -> None:
    """Attach the times to a ``ModelRunnerOutput``."""
    output.lamina_step_times = times


def reported_times(output: Any) -> StepTimes | None:
    """The times of a ``ModelRunnerOutput``; None where there are none, as for a step without tokens."""
    times = getattr(output, "lamina_step_times", None)
    return StepTimes(*times) if times is not None else None
