"""vLLM's layer of multi-head latent attention, and what vLLM's configuration makes of such a model on a CPU.

Relies on ``MLAAttention``: its sizes, ``kv_b_proj``, the parameters ``W_UK_T`` and ``W_UV`` that it makes of that one's
weight, and that its ``forward`` calls ``update_kv_cache`` and ``forward_impl``; and on the fields of the configuration
that the CPU platform changes for such a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import ModelZoo
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_lamina.attention_backend import Exchange, LaminaAttentionBackend, LaminaLatentBackend
from vllm_lamina.compat.attention import settle_layers
from vllm_lamina.compat.backends import override_attention_backend, restore_attention_backend
from vllm_lamina.compat.config import with_batches_in_flight
from vllm_lamina.compat.geometry import geometry_of, geometry_of_layers, groups_of
from vllm_lamina.compat.latent_attention import BACKENDS, absorb, expand, project, restore_settings
from vllm_lamina.device import device_for
from vllm_lamina.errors import UnsupportedError
from vllm_lamina.kv_cache.geometry import Geometry

HEADS, NOPE, ROPE, RANK, VALUE = 4, 48, 64, 512, 64
SIZES = {
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "q_lora_rank": None,
    "kv_lora_rank": RANK,
}


class Projection(torch.nn.Linear):
    """What of a ``ColumnParallelLinear`` an MLA layer uses."""

    quant_method = UnquantizedLinearMethod()

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


@pytest.fixture(scope="module")
def arguments(model_zoo: ModelZoo) -> dict[str, Any]:
    return {
        "model": model_zoo("deepseek_v3"),
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
    }


@pytest.fixture
def config(arguments: dict[str, Any]) -> VllmConfig:
    return EngineArgs(**arguments).create_engine_config()


@pytest.fixture
def layers(config: VllmConfig) -> Iterator[Any]:
    """`layers(use_sparse=True)` makes a layer as a model in Lamina's model worker does."""
    exchange = Exchange(device_for("cpu"), timeout=1.0).activate()
    for name in BACKENDS:
        override_attention_backend(name, "vllm_lamina.attention_backend.LaminaLatentBackend")

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        plain = {
            "num_heads": HEADS,
            "scale": 0.1,
            "kv_b_proj": Projection(RANK, HEADS * (NOPE + VALUE), bias=False),
        }
        with set_current_vllm_config(config), torch.inference_mode():
            layer = MLAAttention(
                **SIZES | plain | {"cache_config": config.cache_config, "prefix": "layer"} | changes
            )
            layer.process_weights_after_loading(torch.float32)
        return layer

    yield make
    for name in BACKENDS:
        restore_attention_backend(name)
    exchange.deactivate()


def test_the_absorbed_projections_are_the_expanded_ones(layers: Any) -> None:
    """A query attends a latent row as it does the key that the row stands for; likewise values."""
    layer = layers()
    layer.kv_b_proj = torch.nn.Identity()  # as LoRA puts another one there
    latent, rotary, query = torch.randn(5, RANK), torch.randn(5, ROPE), torch.randn(3, HEADS, NOPE + ROPE)
    absorbed = torch.full((3, HEADS, RANK + ROPE), torch.nan)
    with torch.inference_mode():
        keys, values = expand(layer, latent, rotary)
        absorb(layer, query, absorbed)
        rows = torch.cat((latent, rotary), -1)
        weights = torch.rand(3, HEADS, 5)
        summed = project(layer, torch.einsum("qhk,kd->qhd", weights, latent))
    torch.testing.assert_close(
        torch.einsum("qhd,kd->qhk", absorbed, rows),
        torch.einsum("qhd,khd->qhk", query, keys),
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(summed, torch.einsum("qhk,khd->qhd", weights, values), rtol=1e-4, atol=1e-4)


def test_a_layer_is_handed_over_whole(layers: Any, config: VllmConfig) -> None:
    layer = layers()
    assert layer.attn_backend is LaminaLatentBackend
    settle_layers(config, LaminaAttentionBackend, LaminaLatentBackend)
    tokens = torch.randn(2, HEADS, NOPE + ROPE), torch.randn(2, RANK), torch.randn(2, 1, ROPE)
    calls = []
    layer.impl.forward = lambda *given: calls.append(given) or given[-1].fill_(7.0)
    with set_forward_context({"layer": None}, config, slot_mapping={"layer": torch.zeros(2)}):
        out = layer(*tokens, output_shape=(2, HEADS * VALUE))
    assert torch.equal(out, torch.full((2, HEADS * VALUE), 7.0))
    ((owner, *given, metadata, _),) = calls
    assert (owner, metadata) == (layer, None)
    for ours, theirs in zip(given, tokens, strict=True):
        assert torch.equal(ours, theirs)
    del layer.impl.forward
    assert not layer.impl.forward(layer, *tokens, None, out).any()
    with pytest.raises(ValueError, match="output_scale: not served"):
        layer.forward_impl(*tokens, None, None, out, output_scale=torch.ones(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indexer": torch.nn.Module()}, "sparse attention by an indexer"),
        (
            {"non_causal_multi_token_decode": True},
            "other attention options .*non_causal_multi_token_decode=True",
        ),
        ({"q_pad_num_heads": 8}, "other attention options .*q_pad_num_heads"),
    ],
)
def test_what_else_a_layer_asks_for(
    layers: Any, config: VllmConfig, change: dict[str, Any], message: str
) -> None:
    def load() -> None:
        layers(**change)
        settle_layers(config, LaminaAttentionBackend, LaminaLatentBackend)

    with pytest.raises(UnsupportedError, match=message):
        load()


def test_geometry(layers: Any, config: VllmConfig) -> None:
    config.cache_config.block_size = 64
    expected = Geometry.uniform(3, 64, HEADS, 1, RANK + ROPE, "float32", (1.0,) * 3, latent_size=RANK)
    assert geometry_of(config) == expected
    assert expected.block_bytes() == 3 * 64 * 576 * 4
    layer = layers()
    config.cache_config.kv_cache_layout = "LBHNC"
    groups = groups_of(config, {"layer": layer.get_kv_cache_spec(config)})
    names, geometry = geometry_of_layers(config, groups)
    assert (list(names), geometry) == (
        ["layer"],
        Geometry.uniform(1, 64, HEADS, 1, RANK + ROPE, "float32", (0.1,), latent_size=RANK),
    )


def test_sizes_of_a_model_type_that_vllm_does_not_list(
    arguments: dict[str, Any], model_zoo: ModelZoo
) -> None:
    """It says the head size of their keys, and makes layers with a latent row."""
    config = EngineArgs(**arguments | {"model": model_zoo("youtu")}).create_engine_config()
    assert config.model_config.get_head_size() == 32
    geometry = geometry_of(config)
    assert geometry is not None
    assert (geometry.caches[0].head_size, geometry.caches[0].head_size_v) == (256 + 32, 256)


@pytest.mark.parametrize(
    ("given", "block_size"),
    [
        ({}, None),
        ({"block_size": 64, "max_num_batched_tokens": 128}, 64),
        ({"enable_prefix_caching": False}, None),
    ],
)
def test_settings_are_the_users(
    arguments: dict[str, Any], given: dict[str, Any], block_size: int | None
) -> None:
    """Where the CPU has no AMX, vLLM changes them, for a kernel of its own."""
    engine = EngineArgs(**arguments | given)
    config = engine.create_engine_config()
    restore_settings(config, engine)
    assert config.cache_config.enable_prefix_caching is given.get("enable_prefix_caching", True)
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens == engine.max_num_batched_tokens
    assert engine.max_num_batched_tokens == given.get("max_num_batched_tokens", engine.max_num_batched_tokens)
    assert block_size in (None, config.cache_config.block_size)
    assert not restore_settings(config, engine)
    for num_batches in (1, 2):
        with_batches_in_flight(config, num_batches).__post_init__()  # as an engine core of its own does
        assert not restore_settings(config, engine)


def test_settings_of_other_models_stay(model_zoo: ModelZoo, arguments: dict[str, Any]) -> None:
    engine = EngineArgs(**arguments | {"model": model_zoo("llama")})
    config = engine.create_engine_config()
    engine.enable_prefix_caching = False
    assert not restore_settings(config, engine)
    assert config.cache_config.enable_prefix_caching
