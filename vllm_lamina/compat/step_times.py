"""How long a step took on either side, carried to the scheduler with vLLM's output of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vllm_lamina._native import AttentionClient


class StepTimes(NamedTuple):
    """Seconds of one step: on the model worker without its waiting, and on the attention worker.

    ``waits`` counts, by the classes of ``_native.WAIT_BOUNDS``, how long the model worker waited for each layer's
    output with nothing else to do; ``waited`` is their sum.
    """

    model: float
    attention: float
    waits: tuple[int, ...] = ()
    waited: float = 0.0


def times_of_step(client: AttentionClient, lane: int, seconds: float) -> StepTimes:
    """The times of the lane's last step, which took ``seconds`` from its begin to its output."""
    waiting, attention = client.step_times(lane)
    return StepTimes(seconds - waiting, attention, *client.step_waits(lane))


def report_times(output: Any, times: StepTimes) -> None:
    """Attach the times to a ``ModelRunnerOutput``."""
    output.lamina_step_times = times


def reported_times(output: Any) -> StepTimes | None:
    """The times of a ``ModelRunnerOutput``; None where there are none, as for a step without tokens."""
    times = getattr(output, "lamina_step_times", None)
    return StepTimes(*times) if times is not None else None
