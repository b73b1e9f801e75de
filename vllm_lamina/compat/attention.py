"""What vLLM says of attention: of a layer, its KV cache spec and a step's metadata. What is not served is refused.

Some fields of these objects are read, or mean nothing to Lamina. Every other one must have its default, which is plain
causal attention: with another value the layer would be computed as if it had that one. So a field that is new in vLLM
is refused as soon as a model uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_lamina.compat.latent_attention import hand_over
from vllm_lamina.support import refuse_fields

SPECS: tuple[type[KVCacheSpec], ...] = (
    FullAttentionSpec,
    SlidingWindowSpec,
    ChunkedLocalAttentionSpec,
    MLAAttentionSpec,
)

# `geometry` reads them, but for page_size_padded, which is vLLM's accounting, dcp_sharded, for context parallelism,
# which is refused, and cache_dtype_str, which says the dtype once more.
SPEC_FIELDS = frozenset(
    {
        "block_size",
        "num_kv_heads",
        "head_size",
        "head_size_v",
        "dtype",
        "sliding_window",
        "attention_chunk_size",
        "page_size_padded",
        "dcp_sharded",
        "cache_dtype_str",
    }
)
"""Fields of these specs that may have any value."""

# The scheduler says them: what is sent to the attention workers is made of that, see `attention_backend.step`. But for
# the spans of multimodal inputs, which the metadata builder reads.
METADATA_FIELDS = frozenset(
    {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "positions",
        "is_prefilling",
        "mm_req_doc_ranges",
        "req_idx",
        "_num_computed_tokens_cache",
        "_token_to_req_indices_cache",
    }
)
"""Fields of a ``CommonAttentionMetadata`` that may have any value."""

LAYER_ATTRIBUTES = {"use_alibi_sqrt": False, "query_quant": None}
"""What an ``Attention`` layer is told and tells neither its implementation nor its spec, as it must be."""

LATENT_LAYER_ATTRIBUTES = {
    "use_sparse": False,
    "dcp_q_replicate": False,
    "use_pcp": False,
    "hisparse_cache": None,
}
"""The same of an ``MLAAttention``."""

_METADATA_DEFAULTS = tuple(
    (field.name, field.default)
    for field in dataclasses.fields(CommonAttentionMetadata)
    if field.name not in METADATA_FIELDS
)


def settle_layers(config: VllmConfig, backend: type, latent_backend: type) -> None:
    """Tell the layers' implementations what vLLM tells the layers alone, and refuse a loaded model in which one attends
    otherwise than ``backend`` does, or with a latent cache ``latent_backend``. Layers that keep a state are vLLM's own.

    Raises
    ------
    UnsupportedError
        Names the feature, the layer and what it says.
    """
    # The attention backend imports this module, and they import their backends.
    from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention, MLAAttention

    if not any(True for _ in _attention_layers(config)):
        refuse_fields({"attention_layers": 0}, config.model_config.model)
    for name, layer in _attention_layers(config):
        said = _said_by_spec(layer.get_kv_cache_spec(config))
        if type(layer) is ChunkedLocalAttention:
            # vLLM's own makes a backend that turns chunks into requests; ours knows chunks.
            layer.attn_backend = backend
        if type(layer) is MLAAttention:
            said |= _said_by_layer(layer, latent_backend, LATENT_LAYER_ATTRIBUTES)
        elif type(layer) in (Attention, ChunkedLocalAttention):
            said |= _said_by_layer(layer, backend, LAYER_ATTRIBUTES)
        else:
            said["class"] = type(layer).__name__
        if said:
            refuse_fields(said, f"the attention layer {name}")
        if type(layer) is MLAAttention:
            hand_over(layer)
        else:
            layer.impl.complete(layer.head_size_v, getattr(layer, "attention_chunk_size", 0))


def implementations(config: VllmConfig) -> Iterator[Any]:
    """What attends in a loaded model's layers, one after the other."""
    return (layer.impl for _, layer in _attention_layers(config))


def _attention_layers(config: VllmConfig) -> Iterator[tuple[str, Any]]:
    """A loaded model's attention layers with their names, but for those that keep a state in place of KV."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    for name, layer in config.compilation_config.static_forward_context.items():
        if isinstance(layer, AttentionLayerBase) and not isinstance(layer, MambaBase):
            yield name, layer


def check_spec(name: str, spec: Any) -> None:
    """Refuse the KV cache spec of a layer that is not one of causal attention. Raises as `settle_layers`."""
    if said := _said_by_spec(spec):
        refuse_fields(said, f"the KV cache of {name}")


def check_metadata(metadata: CommonAttentionMetadata) -> None:
    """Refuse a step that is not one of causal attention. Raises as `settle_layers`."""
    said = {
        name: value
        for name, default in _METADATA_DEFAULTS
        # By identity: all of them are None or True, and a tensor would be compared element by element.
        if (value := getattr(metadata, name)) is not default
    }
    if said:
        refuse_fields(said, "the metadata of a step")


def _said_by_spec(spec: Any) -> dict[str, Any]:
    """What a spec says beside the fields that may have any value."""
    if type(spec) not in SPECS:
        return {"KV cache spec": type(spec).__name__}
    # Every rank of a model has all of a latent cache, as we do.
    unread = {"max_tp_shards": 1} if type(spec) is MLAAttentionSpec else {}
    return {
        field.name: value
        for field in dataclasses.fields(spec)
        if field.name not in SPEC_FIELDS
        and (value := getattr(spec, field.name)) != unread.get(field.name, field.default)
    }


def _said_by_layer(layer: Any, backend: type, attributes: Mapping[str, object]) -> dict[str, Any]:
    """What a layer says that reaches neither its implementation nor its spec."""
    said = {name: getattr(layer, name) for name, value in attributes.items() if getattr(layer, name) != value}
    return said if layer.attn_backend is backend else said | {"attn_backend": layer.attn_backend.__name__}
