"""A loaded model's layers must be what vLLM's configuration says, by which the attention workers were checked."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import ModelZoo
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_lamina.compat.config import settle_block_size
from vllm_lamina.compat.geometry import geometry_of, geometry_of_layers
from vllm_lamina.errors import UnsupportedError
from vllm_lamina.kv_cache.geometry import Geometry

SPEC = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
LAYERS = ("a", "b", "c")


@pytest.fixture(scope="module")
def config(model_zoo: ModelZoo) -> VllmConfig:
    """Of the model with three layers of 8 query heads, and its layers."""
    arguments = {"dtype": "float32", "block_size": 32, "max_model_len": 512, "enforce_eager": True}
    config = EngineArgs(model_zoo("llama"), **arguments).create_engine_config()  # type: ignore[arg-type]
    for i, name in enumerate(LAYERS):
        layer = SimpleNamespace(num_heads=8, impl=SimpleNamespace(scale=0.1 * (i + 1)))
        config.compilation_config.static_forward_context[name] = layer
    return config


def test_layers_add_their_scales(config: VllmConfig) -> None:
    assert geometry_of(config) == Geometry.uniform(3, 32, 8, 2, 32, "float32", (1.0, 1.0, 1.0))
    found = geometry_of_layers(config, dict.fromkeys(LAYERS, SPEC))
    assert found == Geometry.uniform(3, 32, 8, 2, 32, "float32", (0.1, 0.2, 0.1 * 3))


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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(SPEC, num_kv_heads=4), "num_kv_heads of b is 4, by the configuration 2"),
        (replace(SPEC, head_size=64, head_size_v=64), "head_size of b is 64, by the configuration 32"),
        (replace(SPEC, dtype=torch.bfloat16), "dtype of b is bfloat16, by the configuration float32"),
        (replace(SPEC, block_size=64), "block_size of b is 64, by the configuration 32"),
        (replace(SPEC, head_size_v=16), "other attention options .* the KV cache of b with head_size_v=16"),
    ],
)
def test_a_layer_that_differs(config: VllmConfig, spec: FullAttentionSpec, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        geometry_of_layers(config, {"a": SPEC, "b": spec, "c": SPEC})


def test_a_layer_too_few(config: VllmConfig) -> None:
    with pytest.raises(UnsupportedError, match="2 attention layers where their configuration says 3"):
        geometry_of_layers(config, {"a": SPEC, "b": SPEC})
