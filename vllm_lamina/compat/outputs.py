"""What the model worker answers to a step: vLLM's output of it, which carries a report of ours to the scheduler."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, NamedTuple

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

NOTHING_TO_DO = EMPTY_MODEL_RUNNER_OUTPUT
"""The output of a step without tokens."""


class LaterOutput(AsyncModelRunnerOutput):
    """The output of a step that may still run; who asks for it waits."""

    def __init__(self, output: Future[ModelRunnerOutput]) -> None:
        self._output = output

    def get_output(self) -> ModelRunnerOutput:
        return self._output.result()

    def get_kv_connector_output(self) -> None:
        """What a step that failed has transferred all the same; there is no KV connector. vLLM 0.32 does not ask."""


class StepTimes(NamedTuple):
    """Seconds of one step: on the model worker without its waiting, and on the attention worker.

    ``waits`` counts, by the classes of ``_native.WAIT_BOUNDS``, how long the model worker waited for each layer's
    output with nothing else to do; ``waited`` is their sum.
    """

    model: float
    attention: float
    waits: tuple[int, ...] = ()
    waited: float = 0.0


def report_times(output: Any, times: StepTimes) -> None:
    """Attach the times to a ``ModelRunnerOutput``."""
    output.lamina_report = tuple(times)


def reported_times(output: Any) -> StepTimes | None:
    """The times of a ``ModelRunnerOutput``; None where there are none, as for a step without tokens or a failed one."""
    report = getattr(output, "lamina_report", None)
    return StepTimes(*report) if report else None


def failed_step() -> ModelRunnerOutput:
    """The output of a step of which nothing was sampled, because an attention worker was lost."""
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    output.lamina_report = ()
    return output


def has_failed(output: Any) -> bool:
    """Whether the output is one of `failed_step`."""
    return getattr(output, "lamina_report", None) == ()
