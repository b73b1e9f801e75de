"""All that vLLM can say of attention is read or refused: a field that is new in vLLM fails here until it is either.

Relies on the fields of the KV cache specs and of ``CommonAttentionMetadata``, on the arguments of ``Attention`` and
``AttentionImpl``, on ``static_forward_context`` holding the layers, and on their ``get_kv_cache_spec`` and attributes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import ModelZoo
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import attention as layers
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
)

from vllm_lamina.attention_backend import LaminaAttentionBackend, LaminaLatentBackend
from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.attention_backend.impl import LaminaAttentionImpl
from vllm_lamina.compat.attention import (
    METADATA_FIELDS,
    SPEC_FIELDS,
    SPECS,
    check_metadata,
    check_spec,
    settle_layers,
)
from vllm_lamina.compat.backends import override_attention_backend, restore_attention_backend
from vllm_lamina.device import device_for
from vllm_lamina.errors import UnsupportedError

# A value that is not served, for each field or argument that is not read, with what the message names.
OTHER_SPECS = {
    "block_stride_alignment": (512, "other attention options"),
    "max_tp_shards": (2, "other attention options"),
    "is_draft": (True, "other attention options"),
    "kv_quant_mode": (KVQuantMode.FP8_PER_TENSOR, "quantised KV cache"),
    "num_head_slots": (4, "other attention options"),
    "state_content_bytes": (1 << 10, "other attention options"),
    "tokens_per_state": (2, "other attention options"),
    "extra_retained_tokens": (3, "other attention options"),
    "non_causal": (True, "attention that is not causal"),
    "topk_buffer_width": (64, "sparse attention by an indexer"),
    "alignment": (576, "other attention options"),
    "model_version": ("deepseek_v4", "other attention options"),
    "cache_role": (SparseCacheRole.INDEXER, "sparse attention by an indexer"),
    "is_index_group_leader": (True, "sparse attention by an indexer"),
    "non_causal_multi_token_decode": (True, "other attention options"),
}
OTHER_METADATA = {
    "causal": (False, "attention that is not causal"),
    "logits_indices_padded": (torch.zeros(2), "prefill without the layers that share KV"),
    "num_logits_indices": (1, "prefill without the layers that share KV"),
    "max_logits_per_req": (1, "prefill without the layers that share KV"),
    "encoder_seq_lens": (torch.ones(2), "cross attention"),
    "encoder_seq_lens_cpu": (torch.ones(2), "cross attention"),
    "dcp_local_seq_lens": (torch.ones(2), "context parallelism"),
    "dcp_local_seq_lens_cpu_upper_bound": (torch.ones(2), "context parallelism"),
    "rswa_prefix_lens": (torch.ones(2), "other attention options"),
    "replayssm_decode_base_cpu": (torch.ones(2), "other attention options"),
}
OTHER_IMPLS = {
    "kv_cache_dtype": ("fp8", "quantised KV cache"),
    "attn_type": ("encoder_only", "encoder attention"),
}
OTHER_LAYERS = {
    "use_alibi_sqrt": (True, "use_alibi_sqrt is not supported"),  # vLLM itself
    "attn_type": ("encoder_decoder", "cross attention"),
    "attn_backend": (type("Other", (LaminaAttentionBackend,), {}), "other attention options .*='Other'"),
    "extra_impl_args": (1, "other attention options"),
}
IMPL_ARGUMENTS = {
    "num_heads",
    "head_size",
    "scale",
    "num_kv_heads",
    "alibi_slopes",
    "logits_soft_cap",
    "kv_sharing_target_layer_name",
}
LAYER_ARGUMENTS = IMPL_ARGUMENTS | {
    "cache_config",
    "quant_config",
    "prefix",
    "per_layer_sliding_window",
    "head_size_v",
    "mm_prefix_clamp_sliding_window",  # what it says of the tokens behind a token is so for every layer here
}
"""Those that are read: by the implementation, or by way of the spec."""

# Layers of vLLM that are not ``Attention`` itself, with arguments of their own; MLA and multimodal encoders aside.
KINDS = {
    "PrefillPrefixLMAttention": ({}, "attention that is not causal"),
    "EncoderOnlyAttention": ({}, "encoder attention"),
    "CrossAttention": ({}, "cross attention"),
    "RSWAAttention": ({"rswa_window": 64}, "other attention options"),
    "StaticSinkAttention": ({"sink_len": 32}, "other attention options"),
}

SHAPE: dict[str, Any] = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
SPEC = FullAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=64)
LATENT = MLAAttentionSpec(**SHAPE | {"num_kv_heads": 1}, max_tp_shards=1)
METADATA = CommonAttentionMetadata(
    query_start_loc=torch.tensor([0, 1, 3]),
    query_start_loc_cpu=torch.tensor([0, 1, 3]),
    seq_lens=torch.tensor([4, 2]),
    num_reqs=2,
    num_actual_tokens=3,
    max_query_len=2,
    max_seq_len=4,
    block_table_tensor=torch.zeros(2, 1),
    slot_mapping=torch.zeros(3),
)

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def config(model_zoo: ModelZoo) -> VllmConfig:
    arguments = {"dtype": "float32", "block_size": 32, "max_model_len": 512, "enforce_eager": True}
    return EngineArgs(model_zoo("llama"), **arguments).create_engine_config()  # type: ignore[arg-type]


@pytest.fixture
def load(config: VllmConfig) -> Iterator[Make]:
    """`load("Attention", head_size_v=64)` makes a layer as a model in Lamina's model worker does, and checks it."""
    device = device_for("cpu")
    exchange = Exchange(device, timeout=1.0).activate()
    override_attention_backend(
        device.backend_name, f"{LaminaAttentionBackend.__module__}.LaminaAttentionBackend"
    )

    def make(kind: str, **arguments: Any) -> Any:
        plain = {"num_heads": 4, "head_size": 32, "scale": 1.0, "num_kv_heads": 2, "prefix": "model.layers.0"}
        with set_current_vllm_config(config):
            layer = getattr(layers, kind)(**plain | {"cache_config": config.cache_config} | arguments)
            settle_layers(config, LaminaAttentionBackend, LaminaLatentBackend)
        return layer

    yield make
    config.compilation_config.static_forward_context.clear()
    restore_attention_backend(device.backend_name)
    exchange.deactivate()


def names(described: Any) -> list[str]:
    if dataclasses.is_dataclass(described):
        return [field.name for field in dataclasses.fields(described)]
    return [name for name in inspect.signature(described).parameters if name != "self"]


@pytest.mark.parametrize(
    ("described", "read", "others"),
    [
        *((spec, SPEC_FIELDS, OTHER_SPECS) for spec in SPECS),
        (CommonAttentionMetadata, METADATA_FIELDS, OTHER_METADATA),
        (AttentionImpl.__init__, IMPL_ARGUMENTS | {"sliding_window"}, OTHER_IMPLS),
        (Attention.__init__, LAYER_ARGUMENTS, OTHER_LAYERS),
    ],
)
def test_each_is_read_or_refused(described: Any, read: set[str], others: dict[str, Any]) -> None:
    assert not set(names(described)) - set(read) - others.keys()
    assert not read & others.keys()


def test_causal_attention_is_served(load: Make) -> None:
    check_spec("a", SPEC)
    check_spec("a", WINDOW)
    check_spec("a", LATENT)
    check_metadata(METADATA)
    load("Attention")


def test_a_model_without_attention(config: VllmConfig) -> None:
    """Such as one of a hybrid family whose layers all keep states."""
    with pytest.raises(UnsupportedError, match=r"attention-free models .* there is no attention to move"):
        settle_layers(config, LaminaAttentionBackend, LaminaLatentBackend)


def test_what_only_the_layer_is_told(load: Make) -> None:
    """And the backend that vLLM makes of chunks is not used."""
    assert load("Attention", head_size_v=64).impl.shape.head_size_v == 64
    layer = load("ChunkedLocalAttention", attention_chunk_size=64, prefix="model.layers.1")
    assert layer.impl.shape.chunk == 64
    assert layer.get_attn_backend() is LaminaAttentionBackend
    with pytest.raises(UnsupportedError, match=r"head sizes other than .* head_size=40"):
        load("Attention", head_size_v=40, prefix="model.layers.2")


@pytest.mark.parametrize(
    ("spec", "name"),
    [(spec, name) for spec in (SPEC, WINDOW, LATENT) for name in names(spec) if name not in SPEC_FIELDS],
)
def test_spec(spec: Any, name: str) -> None:
    value, message = OTHER_SPECS[name]
    with pytest.raises(UnsupportedError, match=rf"{message}.* the KV cache of a with {name}="):
        check_spec("a", dataclasses.replace(spec, **{name: value}))


@pytest.mark.parametrize("name", [name for name in names(METADATA) if name not in METADATA_FIELDS])
def test_metadata(name: str) -> None:
    value, message = OTHER_METADATA[name]
    with pytest.raises(UnsupportedError, match=rf"{message}.* the metadata of a step with {name}="):
        check_metadata(METADATA.replace(**{name: value}))


@pytest.mark.parametrize("name", OTHER_IMPLS)
def test_implementation(load: Make, name: str) -> None:
    value, message = OTHER_IMPLS[name]
    with pytest.raises(UnsupportedError, match=message):
        LaminaAttentionImpl(4, 32, 1.0, **{name: value})


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_layer(load: Make, name: str) -> None:
    value, message = OTHER_LAYERS[name]
    with pytest.raises((UnsupportedError, ValueError), match=message):
        load("Attention", **{"unknown" if name == "extra_impl_args" else name: value})


def test_kinds_of_layers_are_here() -> None:
    assert {name for name in layers.__all__ if name.endswith("Attention")} - KINDS.keys() == {
        "Attention",
        "ChunkedLocalAttention",
        "MLAAttention",
        "MMEncoderAttention",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_layer(load: Make, kind: str) -> None:
    arguments, message = KINDS[kind]
    with pytest.raises(UnsupportedError, match=message):
        load(kind, **arguments)
