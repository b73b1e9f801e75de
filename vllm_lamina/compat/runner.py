"""The runner port: what a lane asks of vLLM's model runner. Each model runner of vLLM has a file that implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput


class LaneRunner(Protocol):
    """One lane's model runner. All lanes of a model worker share the model's weights and its adapters."""

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run a step up to its logits; None where it has tokens to sample, which `sample` does."""

    def sample(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        """Sample from the step that was executed last."""

    def forget_step(self) -> None:
        """Do not sample from the step that was executed last, and stand where it did not happen."""

    def order(self) -> Sequence[str]:
        """The requests of the step that is being executed, in the order of its batch; once it is prepared."""

    def take_over(self, request_id: str, other: Self) -> None:
        """Go on with a request that another lane's runner has run so far; neither has it in flight."""

    def load_adapter(self, lora_request: Any) -> None:
        """Load a LoRA adapter; no lane has a step in flight."""
