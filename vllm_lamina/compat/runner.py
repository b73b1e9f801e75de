"""The runner port: what a lane asks of vLLM's model runner. Each model runner of vLLM has a file that implements it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput


class LaneRunner(Protocol):
    """One lane's model runner. All lanes of a model worker share the model's weights and its adapters.

    Attributes
    ----------
    shared_places
        How many requests the runners of all lanes together can know, where they share the requests' states; any lane
        can then run a request, and forget it. None where each runner knows its own requests alone.
    """

    shared_places: int | None

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run a step up to its logits; None where it has tokens to sample, which `sample` does."""

    def sample(self, grammar_output: GrammarOutput | None) -> Callable[[], ModelRunnerOutput]:
        """Sample from the step that was executed last; what is returned waits for the tokens."""

    def forget_step(self) -> None:
        """Do not sample from the step that was executed last, and stand where it did not happen."""

    def order(self) -> Sequence[str]:
        """The requests of the step that is being executed, in the order of its batch; once it is prepared."""

    def use_graphs(self) -> None:
        """What is captured and replayed is this lane's from now on, until another lane uses its own."""

    def capture(self) -> None:
        """Capture the graphs of a further lane, once vLLM has captured those of the first, where it captures any."""

    def load_adapter(self, lora_request: Any) -> None:
        """Load a LoRA adapter; no lane has a step in flight."""


def lane_runners(
    first: Any, num_lanes: int, config: VllmConfig, kv_cache_config: KVCacheConfig
) -> Sequence[LaneRunner]:
    """Runners of so many lanes: ``first``, whose KV cache is initialised, and others with its model."""
    port: Any
    if config.use_v2_model_runner:
        from vllm_lamina.compat import runner_v2 as port
    else:
        from vllm_lamina.compat import runner_v1 as port

    runners = [first]
    with set_current_vllm_config(config):
        runners += [port.further_runner(first, config, kv_cache_config) for _ in range(1, num_lanes)]
    for lane, runner in enumerate(runners):
        for group in itertools.chain.from_iterable(runner.attn_groups):
            group.get_metadata_builder().lane = lane
    return [port.Runner(runner) for runner in runners]
