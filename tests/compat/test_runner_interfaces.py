"""What the runner port, and the reader of a scheduled step, rely on in vLLM."""

from __future__ import annotations

import dataclasses
import inspect
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from vllm.config import ModelConfig
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_lamina.compat import multimodal
from vllm_lamina.compat.geometry import counted_bytes
from vllm_lamina.compat.kv_cache import without_tensors
from vllm_lamina.compat.outputs import NOTHING_TO_DO, LaterOutput
from vllm_lamina.compat.scheduled import read_step
from vllm_lamina.compat.step_lane import mark_lane


def names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def output(**fields: object) -> SchedulerOutput:
    made = SchedulerOutput.make_empty()
    for name, value in fields.items():
        setattr(made, name, value)
    mark_lane(made, 1)
    return made


def test_a_scheduled_step_says_it_all() -> None:
    """Relies on these fields, by which blocks follow those that a request has unless it is resumed."""
    assert {"scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens"} <= names(SchedulerOutput)
    assert {"total_num_scheduled_tokens", "finished_req_ids"} <= names(SchedulerOutput)
    assert {"new_block_ids_to_zero", "kv_cache_block_copies"} <= names(SchedulerOutput)
    assert KVCacheBlockCopy._fields == ("src_block_id", "dst_block_id")
    assert {"req_id", "block_ids", "num_computed_tokens", "lora_request"} <= names(NewRequestData)
    cached = CachedRequestData(
        req_ids=["a", "b", "c"],
        resumed_req_ids={"c"},
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[None, ([7],), ([8, 9],)],
        num_computed_tokens=[5, 32, 0],
        num_output_tokens=[1, 1, 1],
    )
    step = read_step(
        output(
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={"a": 1, "b": 1, "c": 40},
            total_num_scheduled_tokens=42,
            finished_req_ids={"d"},
            new_block_ids_to_zero=[7],
            free_encoder_mm_hashes=["x"],
        )
    )
    assert (step.lane, step.num_tokens, step.finished) == (1, 42, {"d"})
    assert step.blocks_to_zero == [7]
    assert step.inputs_to_forget == ["x"]
    a, b, c = step.requests
    assert (a.context_len, a.query_len, list(a.block_ids), a.has_new_blocks, a.is_new) == (
        5,
        1,
        [],
        False,
        False,
    )
    assert (b.context_len, b.query_len, b.block_ids, b.has_new_blocks) == (32, 1, ([7],), False)
    assert (c.context_len, c.query_len, c.block_ids, c.has_new_blocks) == (0, 40, ([8, 9],), True)
    runners = step.for_runner({"e"}, {"y"})
    assert runners.finished_req_ids == {"e"}
    assert runners.free_encoder_mm_hashes == ["y"]
    assert runners.new_block_ids_to_zero is None, "the attention workers zero their blocks"
    assert runners.scheduled_cached_reqs is cached


def test_an_output_may_be_had_later() -> None:
    """Relies on these methods being all that an output of a step which may still run must have."""
    future: Future[ModelRunnerOutput] = Future()
    later = LaterOutput(future)  # which has every abstract method
    future.set_result(NOTHING_TO_DO)
    assert later.get_output() is NOTHING_TO_DO


def test_a_grammar_bitmask_may_be_replaced() -> None:
    assert "grammar_bitmask" in names(GrammarOutput)


def test_the_batch_is_ordered_before_metadata_is_built() -> None:
    """Relies on ``input_batch.req_ids`` being in the step's order when the builder is asked, decodes first."""
    assert AttentionMetadataBuilder.reorder_batch_threshold is None
    source = inspect.getsource(GPUModelRunner.execute_model)
    assert source.index("self._update_states(") < source.index("self._build_attention_metadata(")
    assert "self._may_reorder_batch(" in inspect.getsource(GPUModelRunner._update_states)
    assert isinstance(InputBatch.req_ids, property)


def test_a_second_runner_can_be_made() -> None:
    """Relies on these, and on ``attn_groups`` holding the builders of a runner."""
    parameters = [*inspect.signature(GPUModelRunner.__init__).parameters]
    assert parameters[:3] == ["self", "vllm_config", "device"]
    assert [*inspect.signature(GPUModelRunner.initialize_kv_cache).parameters][1] == "kv_cache_config"
    assert "self.attn_groups" in inspect.getsource(GPUModelRunner.__init__)


def test_a_step_that_ran_can_go_without_sampling() -> None:
    """Relies on ``execute_model_state`` being all that a runner keeps between a step and its sampling."""
    assert "if self.execute_model_state is not None" in inspect.getsource(GPUModelRunner.execute_model)
    assert "self.execute_model_state = None" in inspect.getsource(GPUModelRunner.sample_tokens)
    required = [f.name for f in dataclasses.fields(ModelRunnerOutput) if f.default is dataclasses.MISSING]
    assert {"req_ids", "req_id_to_index"} <= set(required)


def test_draws_for_nothing_are_taken_back_by_an_offset() -> None:
    """Relies on vLLM moving the generators of requests in ``discard_request_mask`` back by one draw's offset."""
    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "self.discard_request_mask.np" in source
    assert "gen.set_offset(gen.get_offset() - 4)" in source


def test_a_kv_cache_can_be_elsewhere() -> None:
    """Relies on these fields, on vLLM allocating what ``kv_cache_tensors`` says, and on its counting by page sizes."""
    assert {"kv_cache_groups", "kv_cache_tensors", "num_blocks"} <= names(KVCacheConfig)
    assert "layer_names" in names(KVCacheGroupSpec)
    assert isinstance(FullAttentionSpec.page_size_bytes, property)
    assert "self.kv_caches" in inspect.getsource(GPUModelRunner.__init__)
    assert "original_max_model_len" in inspect.getsource(ModelConfig)
    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    group = KVCacheGroupSpec(["a", "b"], spec)
    config = KVCacheConfig(num_blocks=3, kv_cache_tensors=["anything"], kv_cache_groups=[group])
    layers = {"b": SimpleNamespace(kv_sharing_target_layer_name="a"), "a": SimpleNamespace()}
    vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    group_of_one = KVCacheGroupSpec(["a"], spec)
    elsewhere = without_tensors(dataclasses.replace(config, kv_cache_groups=[group_of_one]), vllm_config)
    assert elsewhere.kv_cache_tensors == []
    assert elsewhere.kv_cache_groups[0].layer_names == ["a", "b"]
    assert group_of_one.layer_names == ["a"]
    assert layers["b"].kv_sharing_target_layer_name is None
    assert "self.shared_kv_cache_layers" in inspect.getsource(GPUModelRunner.__init__)
    assert counted_bytes([group], 3) == 3 * 2 * (2 * 32 * 2 * 32 * 4)


def test_a_lane_has_its_own_step_in_a_multimodal_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relies on models being modules, whose layers and weights are in ``_modules`` and ``_parameters``."""
    monkeypatch.setattr(multimodal, "supports_multimodal", lambda model: True)
    model = torch.nn.Module()
    model.layer, model.weight = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(2))
    model.features, model.count = [torch.zeros(3)], 0
    model.register_buffer("mask", torch.zeros(3))
    lane = multimodal.model_of_lane(model)
    assert lane.layer is model.layer
    assert lane.weight is model.weight
    lane.features[0] += 1
    lane.mask += 1
    lane.count = 3
    assert not model.features[0].any()
    assert not model.mask.any()
    assert model.count == 0
    model.weight = torch.nn.Parameter(torch.zeros(2))
    assert lane.weight is model.weight
