"""The runner port for vLLM's V2 model runner, which keeps requests' states in one place and gathers a batch each step.

So a lane is the buffers of a step, and all lanes share what is known of the requests, the sampler and the adapters: a
request leaves nothing behind when another lane runs it. Lanes take turns, and in a step a runner writes to its own
requests' states alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.attn_utils import init_attn_backend
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

from vllm_lamina.compat.lora import share_adapters
from vllm_lamina.compat.multimodal import model_of_lane
from vllm_lamina.compat.piecewise_graphs import PiecewiseGraphs


class Runner:
    """See `LaneRunner`."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._order: Sequence[str] = ()
        self._pieces = PiecewiseGraphs(runner.cudagraph_manager.pool)
        self.shared_places: int | None = runner.max_num_reqs

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput | None:
        self._order = sort_batch_req_ids(
            output.num_scheduled_tokens, output.scheduled_spec_decode_tokens, self._runner.decode_query_len
        )
        self.use_graphs()
        executed: ModelRunnerOutput | None = self._runner.execute_model(output)
        return executed

    def sample(self, grammar_output: GrammarOutput | None) -> Callable[[], ModelRunnerOutput]:
        get_output: Callable[[], ModelRunnerOutput] = self._runner.sample_tokens(grammar_output).get_output
        return get_output

    def forget_step(self) -> None:
        # Token counts and tokens move on when something is sampled; requests and blocks that the step added stay.
        self._runner.execute_model_state = None

    def order(self) -> Sequence[str]:
        return self._order

    def use_graphs(self) -> None:
        self._pieces.use()

    def capture(self) -> None:
        self.use_graphs()
        if self._runner.cudagraph_manager.needs_capture():
            self._runner.capture_model()

    def load_adapter(self, lora_request: Any) -> None:
        self._runner.add_lora(lora_request)


def further_runner(first: Any, config: VllmConfig, kv_cache_config: KVCacheConfig) -> Any:
    """What is the first runner but for the buffers of a step."""

    class Lane(type(first)):  # type: ignore[misc]
        """The first runner wherever it has nothing of its own, now and when something of it is replaced."""

        def __getattr__(self, name: str) -> Any:
            return getattr(first, name)

    runner = object.__new__(Lane)
    runner.execute_model_state = None
    runner.input_buffers = InputBuffers(first.max_num_reqs, first.max_num_tokens, first.device)
    # The requests' block tables are shared; what is gathered of them for a step is not.
    tables = runner.block_tables = copy.copy(first.block_tables)
    tables.input_block_tables = [torch.zeros_like(table) for table in tables.input_block_tables]
    tables.slot_mappings = torch.zeros_like(tables.slot_mappings)
    tables.init_block_table_layout_tensors()
    runner.attn_groups = init_attn_backend(copy.deepcopy(kv_cache_config), config, first.device)[0]
    state = runner.model_state = copy.copy(first.model_state)
    state.model = runner.model = model_of_lane(first.model)
    if state.supports_mm_inputs:
        encoder = state.encoder_runner = copy.copy(state.encoder_runner)
        encoder.model = runner.model
        encoder.inputs_embeds = torch.zeros_like(encoder.inputs_embeds)
    if state.prompt_embeds_state is not None:
        state.inputs_embeds = torch.zeros_like(state.inputs_embeds)
    if state.rope_state is not None:
        state.rope_state = copy.copy(state.rope_state)
        state.rope_state.positions = torch.zeros_like(state.rope_state.positions)
    runner.cudagraph_manager = _graphs(first, config)
    if config.lora_config is not None:
        share_adapters(first, runner)
    return runner


def _graphs(first: Any, config: VllmConfig) -> Any:
    """A further lane's graphs, which hold the addresses of its own buffers.

    A memory pool is for graphs that run one after the other: those of another lane may run meanwhile, and have their
    own. In sleep mode vLLM may want all of them in one pool; then this lane has none. Graphs that are broken without a
    compiled model (VLLM_USE_BREAKABLE_CUDAGRAPH) are in vLLM's own pool, so this lane has whole steps alone.
    """
    graphs = first.cudagraph_manager
    mode = CUDAGraphMode.NONE if config.use_cumem_cudagraph_pool else graphs.cudagraph_mode
    if graphs.use_breakable_cg:
        mode = mode.without_piecewise()
    further = type(graphs)(config, first.device, mode, graphs.decode_query_len, graphs.lora_capture_cases)
    if mode:
        further.pool = current_platform.graph_pool_handle()
    return further
