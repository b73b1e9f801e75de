"""The runner port for vLLM's V1 model runner, which keeps its batch, and what it knows of requests, from step to step.

So each lane has a model runner of its own, with the model of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput

from vllm_lamina.compat.lora import share_adapters
from vllm_lamina.compat.multimodal import model_of_lane
from vllm_lamina.compat.random_states import keep_random_states


class Runner:
    """See `LaneRunner`."""

    shared_places: int | None = None

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput | None:
        return self._runner.execute_model(output)

    def sample(self, grammar_output: GrammarOutput | None) -> Callable[[], ModelRunnerOutput]:
        keep_random_states(self._runner)
        sampled = self._runner.sample_tokens(grammar_output)
        return lambda: sampled

    def forget_step(self) -> None:
        # The runner holds nothing else of it: token counts come with the next step, tokens and random states change
        # only when something is sampled.
        self._runner.execute_model_state = None

    def order(self) -> Sequence[str]:
        batch = self._runner.input_batch
        order: Sequence[str] = batch.req_ids[: batch.num_reqs]
        return order

    def use_graphs(self) -> None:
        pass  # CPUs have no graphs, and GPUs no V1

    def capture(self) -> None:
        pass

    def load_adapter(self, lora_request: Any) -> None:
        self._runner.add_lora(lora_request)


def further_runner(first: Any, config: VllmConfig, kv_cache_config: KVCacheConfig) -> Any:
    """A model runner with the first one's model, adapters and encoder outputs; all else is its own."""
    runner = type(first)(config, first.device)
    runner.model = model_of_lane(first.model)
    # The scheduler counts on what any lane's step encodes, and lets any lane's step forget it. A step encodes and reads
    # in its first turn, and first turns come in the order of the steps.
    runner.encoder_cache = first.encoder_cache
    if config.lora_config is not None:
        share_adapters(first, runner)
    runner.initialize_kv_cache(kv_cache_config)
    runner.kv_caches = first.kv_caches  # states, which the layers have
    return runner
