"""The geometry is what a loaded model's layers say, in vLLM's KV cache groups; before, what its configuration says."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import torch
from models import ModelZoo
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_lamina.compat.config import settle_block_size
from vllm_lamina.compat.geometry import _planning, counted_bytes, geometry_of, geometry_of_layers, groups_of
from vllm_lamina.device.base import LayerShape
from vllm_lamina.errors import UnsupportedError
from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, LayerSpec

SPEC = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
WINDOW = SlidingWindowSpec(
    block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64
)


@pytest.fixture
def config(model_zoo: ModelZoo) -> VllmConfig:
    arguments = {"dtype": "float32", "block_size": 32, "max_model_len": 512, "enforce_eager": True}
    config = EngineArgs(model_zoo("llama"), **arguments).create_engine_config()  # type: ignore[arg-type]
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def add_layer(config: VllmConfig, name: str, shared: str | None = None, **shape: object) -> None:
    """A loaded layer of 8 query heads."""
    layer_shape = LayerShape(8, 2, 32, 32, 0.5, torch.float32, **shape)  # type: ignore[arg-type]
    layer = SimpleNamespace(impl=SimpleNamespace(shape=layer_shape), kv_sharing_target_layer_name=shared)
    config.compilation_config.static_forward_context[name] = layer


def geometry(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> Geometry:
    return geometry_of_layers(config, groups_of(config, specs))[1]


def test_layers_that_are_alike(config: VllmConfig) -> None:
    assert geometry_of(config) == Geometry.uniform(3, 32, 8, 2, 32, "float32", (1.0, 1.0, 1.0))
    for name in "abc":
        add_layer(config, name)
    assert geometry(config, dict.fromkeys("abc", SPEC)) == Geometry.uniform(
        3, 32, 8, 2, 32, "float32", (0.5, 0.5, 0.5)
    )


def test_layers_of_several_kinds(config: VllmConfig) -> None:
    """Windows beside full attention, a layer of more heads in smaller blocks, and one that shares another's KV."""
    sinks = torch.arange(8, dtype=torch.bfloat16)
    add_layer(config, "a", window=64, sinks=sinks)
    add_layer(config, "b", soft_cap=30.0)
    add_layer(config, "c", window=64, alibi_slopes=torch.full((8,), 0.25))
    add_layer(config, "d", shared="c", window=64)
    specs = {"a": WINDOW, "b": replace(SPEC, num_kv_heads=4), "c": WINDOW}
    groups = groups_of(config, specs)
    names, found = geometry_of_layers(config, groups)
    assert names == ["a", "b", "c", "d"]
    assert set(found.caches) == {
        CacheSpec(64, 2, 32, 32, "float32"),
        CacheSpec(32, 4, 32, 32, "float32"),
    }
    a, b, c, d = found.layers
    assert found.caches[a.cache].block_size == 64
    assert a == replace_all(c, sinks=tuple(range(8)), alibi_slopes=(), group=a.group, position=a.position)
    assert (b.window, b.soft_cap, found.caches[b.cache].num_kv_heads) == (0, 30.0, 4)
    assert (c.window, c.alibi_slopes, c.scale) == (64, (0.25,) * 8, 0.5)
    assert d == replace_all(c, alibi_slopes=(), stores=False)
    # vLLM's own count of what its blocks take.
    counted = counted_bytes(groups, 5)
    assert _planning.get_kv_cache_config_from_groups(config, groups, counted).num_blocks == 5
    assert _planning.get_kv_cache_config_from_groups(config, groups, counted - 1).num_blocks == 4


def replace_all(layer: LayerSpec, **fields: object) -> LayerSpec:
    return msgspec.structs.replace(layer, **fields)


@pytest.mark.parametrize("platform", [CpuPlatform, Platform])
@pytest.mark.parametrize(("given", "settled"), [({}, 128), ({"block_size": 64}, 64)])
def test_workers_keep_the_block_size_that_was_settled(
    platform: type[Platform],
    given: dict[str, int],
    settled: int,
    model_zoo: ModelZoo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Relies on ``user_specified_block_size``, and on ``update_block_size_for_backend`` being where workers choose."""
    config = EngineArgs(model_zoo("llama"), dtype="float32", **given).create_engine_config()  # type: ignore[arg-type]
    settle_block_size(config, 128)
    of_worker = pickle.loads(pickle.dumps(config))
    monkeypatch.setattr(platform, "_find_non_ssm_backends", lambda config: [CPUAttentionBackend])
    platform.update_block_size_for_backend(of_worker)
    assert of_worker.cache_config.block_size == settled


def test_a_layer_that_sees_more_than_is_kept(config: VllmConfig) -> None:
    add_layer(config, "a", window=65)
    with pytest.raises(UnsupportedError, match="sliding_window of a is 65, of its KV cache 64"):
        geometry(config, {"a": WINDOW})


def test_a_kind_of_cache_that_is_not_served(config: VllmConfig) -> None:
    add_layer(config, "a")
    with pytest.raises(UnsupportedError, match=r"attention that is not causal .* the KV cache of a"):
        geometry(config, {"a": replace(SPEC, non_causal=True)})


@pytest.mark.parametrize(
    "said",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"num_kv_shared_layers": 2},
        {"kv_lora_rank": 64},
    ],
)
def test_only_the_loaded_model_says(
    config: VllmConfig, said: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in said.items():
        monkeypatch.setattr(config.model_config.hf_text_config, name, value, raising=False)
    assert geometry_of(config) is None


def test_only_the_loaded_model_says_which_layers_attend(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama-Nemotron, some of whose layers have no attention."""
    monkeypatch.setattr(type(config.model_config), "has_noops", True)
    assert geometry_of(config) is None


def test_only_the_loaded_model_says_heads_by_layer(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {1: {"num_key_value_heads": 4}}
    monkeypatch.setattr(config.model_config.model_arch_config, "per_layer_overrides", overrides)
    assert geometry_of(config) is None
