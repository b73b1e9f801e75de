"""What the runner port for vLLM's V2 model runner relies on."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from engines import ENGINE_DEFAULTS, ENGINE_ENV
from models import ModelZoo
from runners import V2, environment
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.attn_utils import init_attn_backend
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_runner import (
    GPUModelRunner,
    get_uniform_decode_token_count,
    sort_batch_req_ids,
)
from vllm.v1.worker.gpu.states import RequestState


def parameters(function: object) -> list[str]:
    return [*inspect.signature(function).parameters]  # type: ignore[arg-type]


def test_the_order_of_a_batch_is_known_before_it_is_prepared() -> None:
    """Relies on vLLM ordering a batch by this function alone, decodes first."""
    assert "sort_batch_req_ids(" in inspect.getsource(GPUModelRunner.gather_batch_req_state)
    assert sort_batch_req_ids({"a": 7, "b": 1, "c": 3}, {}, 1) == ["b", "c", "a"]


def test_requests_are_forgotten_and_known_by_their_names() -> None:
    """Relies on finished requests going first, on a new one taking the place of an older one of its name, and on places
    being as many as requests may run.
    """
    source = inspect.getsource(GPUModelRunner.execute_model)
    assert source.index("self.finish_requests(") < source.index("self.add_requests(")
    assert "self._remove_request(req_id)" in inspect.getsource(GPUModelRunner.add_requests)
    assert "self.free_indices = list(range(max_num_reqs))" in inspect.getsource(RequestState.__init__)


def test_a_step_that_ran_can_go_without_sampling() -> None:
    """Relies on token counts moving on when something is sampled, and on ``execute_model_state`` being overwritten."""
    assert "self.postprocess_sampled(" in inspect.getsource(GPUModelRunner.sample_tokens)
    assert "postprocess" not in inspect.getsource(GPUModelRunner.execute_model)
    assert callable(AsyncOutput.get_output)


def test_a_lane_can_have_buffers_of_its_own() -> None:
    """Relies on these arguments."""
    assert parameters(InputBuffers)[:3] == ["max_num_reqs", "max_num_tokens", "device"]
    assert parameters(init_attn_backend)[:3] == ["kv_cache_config", "vllm_config", "device"]
    made = ["vllm_config", "device", "cudagraph_mode", "decode_query_len", "lora_capture_cases"]
    assert parameters(CudaGraphManager)[:5] == made


def test_a_lane_can_have_graphs_of_its_own() -> None:
    """Relies on a manager capturing in its ``pool``, on what its mode leaves out, and on who replays nothing else."""
    made = inspect.getsource(CudaGraphManager.__init__)
    assert "self.pool = " in made
    assert "self.use_breakable_cg = " in made
    assert "capture_pool(self.pool, " in inspect.getsource(CudaGraphManager.capture)
    assert "if self._graphs_captured and " in inspect.getsource(CudaGraphManager.dispatch)
    assert CUDAGraphMode.FULL_AND_PIECEWISE.without_piecewise() is CUDAGraphMode.FULL_DECODE_ONLY
    assert isinstance(VllmConfig.use_cumem_cudagraph_pool, property)
    captured = inspect.getsource(GPUModelRunner.capture_model)
    assert "self.cudagraph_manager.capture(\n" in captured
    assert "lock_workspace()" in captured


def test_a_captured_step_has_decodes_alone() -> None:
    """Relies on metadata being built for every step, also where a graph is replayed; and on no prefill chunk but of one
    token with context, which is a decode here, being in a uniform batch.
    """
    executed = inspect.getsource(GPUModelRunner.execute_model)
    assert executed.index("self.model_state.prepare_attn(") < executed.index(".run_fullgraph(")
    gathered = inspect.getsource(GPUModelRunner.gather_batch_req_state)
    assert "(num_new_tokens == 1) & (num_computed_prefill_tokens_np > 0)" in gathered
    assert get_uniform_decode_token_count(3, 3, 1, decode_graph_eligible=True) == 1
    assert get_uniform_decode_token_count(3, 3, 1, decode_graph_eligible=False) is None


SHARED = {
    "req_states": "what is known of requests, a row each",
    "block_tables.block_tables": "their KV blocks, a row each",
    "block_tables.num_blocks": "a row each",
    "sampler": "parameters of requests, a row each; and what one sampling needs, which is over with it",
    "prompt_logprobs_worker": "a row each",
    "structured_outputs_worker": "what one sampling needs",
    "lora_state": "a row each",
    "model": "weights",
    "model_state.model": "weights",
}
"""What lanes share of their runners, and why they may: lanes take turns, and in a step a lane writes its rows only."""

PROGRAM = """
import json, sys, types, torch
from vllm import LLM, SamplingParams
from vllm.config import CUDAGraphMode
from vllm.v1.worker import cpu_worker, gpu_worker
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

CODE = type, types.FunctionType, types.MethodType, types.ModuleType

options = json.loads(sys.argv[1])
llm = LLM(**options, executor="lamina", lamina_memory="64MiB", lamina_stagger="always")
worker = llm.llm_engine.model_executor.driver_worker.worker
first, second = (lane.runner._runner for lane in worker.lanes._lanes)

def tensors(attributes):
    found, seen, todo = {}, set(), list(attributes.items())
    while todo:
        path, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.numel() > 1:
                found[path] = value.data_ptr()
        elif isinstance(value, dict):
            todo += [(f"{path}.{key}", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(f"{path}.{i}", item) for i, item in enumerate(value)]
        elif hasattr(value, "__dict__") and not isinstance(value, CODE):
            todo += [(f"{path}.{name}", item) for name, item in vars(value).items()]
    return found

mine, its = tensors(vars(first)), tensors(vars(first) | vars(second))
shared = sorted(path for path, place in its.items() if place in mine.values())

calls = []

def logged(name):
    method = getattr(worker, name)
    def call(*args):
        calls.append(name)
        return method(*args)
    return call

worker.execute_model, worker.sample_tokens = logged("execute_model"), logged("sample_tokens")

def generate():
    prompts = [{"prompt_token_ids": [first + 3 * i % 900 for i in range(140)]} for first in (5, 7)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]

def state():
    [stats] = worker.attention_worker_stats()
    return {
        "steps": stats["steps"],
        "messages": stats["messages"],
        "blocks": list(worker.lanes._planner._block_ids),
        "places": sorted(first.req_states.free_indices),
    }

def kernel_warmup(worker):
    # Of vLLM's own, what it runs; all of it imports what is for GPUs alone.
    first.profile_run()
    first._dummy_run(16)
    first._dummy_run(2, uniform_decode=True)
    run_mixed_prefill_decode_warmup(first, worker.execute_model, worker.sample_tokens, 16)

def run_what_is_captured(manager, create_forward_fn, *_):
    create_forward_fn(BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, 16, None), warmup=False)(CUDAGraphMode.NONE)
    calls.append("capture")

tokens = [generate()]
before = state()
calls.clear()
torch.accelerator.synchronize = lambda: None
gpu_worker.kernel_warmup = kernel_warmup
worker.vllm_config.kernel_config.enable_jit_warmup = True
# Places for so many are free; at a start all are.
first.scheduler_config.max_num_seqs, most = 2, first.scheduler_config.max_num_seqs
cpu_worker.CPUWorker.compile_or_warm_up_model = gpu_worker.Worker.compile_or_warm_up_model
worker.compile_or_warm_up_model()
first.scheduler_config.max_num_seqs = most
CudaGraphManager.capture = run_what_is_captured
first.cudagraph_manager.capture(
    first.model, first.model_state, first.input_buffers, None, first.block_tables, first.attn_groups,
    first.kv_cache_config,
)
warmed = list(calls)
after = state()
tokens.append(generate())
llm.llm_engine.engine_core.shutdown()
print("FOUND " + json.dumps([shared, sorted(its.keys() - set(shared)), warmed, before, after, tokens]))
"""


@pytest.fixture(scope="module")
def found(model_zoo: ModelZoo) -> list[Any]:
    """What the program says of an engine with two lanes."""
    options = json.dumps(ENGINE_DEFAULTS | {"model": model_zoo("llama"), "max_num_seqs": 8})
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, options],
        env=os.environ | ENGINE_ENV | environment(V2),
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, finished.stderr[-3000:]
    return list(json.loads(lines[0].removeprefix("FOUND ")))


def test_lanes_share_requests_and_weights_alone(found: list[Any]) -> None:
    """Fails when vLLM's runner has a further tensor that is neither known to be shared nor a lane's own."""
    shared, own, *_ = found
    unknown = [path for path in shared if not path.startswith(tuple(f"{known}." for known in SHARED))]
    assert not unknown
    assert {"input_buffers.input_ids", "block_tables.slot_mappings"} <= set(own)


def test_warming_up_leaves_nothing_behind(found: list[Any]) -> None:
    """Relies on what a GPU worker runs before the first request, eagerly here where it captures: with steps that no
    scheduler made, or without any. Here there is a prefix cache, which they would spoil, for they name its KV blocks.
    """
    *_, warmed, before, after, tokens = found
    assert warmed.count("execute_model") >= 7
    assert warmed.count("sample_tokens") >= 5
    assert warmed[-1] == "capture"
    assert after == before
    assert tokens[1] == tokens[0]
