"""Reads models from Hugging Face configurations: a file, or one that ships with the planner."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vllm_lamina.errors import ConfigError, UnsupportedError
from vllm_lamina.planner.devices import look_up, package_data
from vllm_lamina.planner.models import AttentionLayers, Experts, Model

_DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


# What configurations leave out that equals the default of their class in transformers.
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window_pattern": 2, "tie_word_embeddings": True},
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    "gemma4_text": {"sliding_window_pattern": 6, "tie_word_embeddings": True},
    "cohere2": {"sliding_window_pattern": 4, "tie_word_embeddings": True},
    "llama4_text": {"no_rope_layer_interval": 4, "attention_chunk_size": 8192},
    "gpt_oss": {"sliding_window_pattern": 2},
}

_OF_STATES = (
    "layers_block_type",
    "hybrid_override_pattern",
    "full_attn_idxs",
    "full_attention_interval",
    "mamba_d_state",
    "ssm_state_size",
    "linear_num_value_heads",
    "conv_L_cache",
)
"""What configurations of hybrid models say of layers that keep a state, some of them alone."""

_OF_LAYERS = ("block_configs", "attention_other_setting")
"""Where configurations say sizes of single layers in a way of their own."""

_OWN_SIZES = frozenset({"num_attention_heads", "num_key_value_heads", "head_dim"})
"""What ``per_layer_config`` may say of a layer; transformers writes Gemma 4's layers without a window there."""

_EXPANDED = ("minicpm3",)
"""Model types whose keys and values vLLM keeps for all heads, of one size, though they come from a latent row."""

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def model_from_config(config: Mapping[str, Any], name: str, source: str = "") -> Model:
    """Read a Hugging Face ``config.json``: dense or MoE, with multi-head, grouped-query, multi-query or latent
    attention, of which some layers may have a sliding window, a chunk, other heads, or the k and v of another layer.

    Raises
    ------
    UnsupportedError
        The attention is not of that kind (an indexer's sparse attention, layers with a state).
    ConfigError
        The configuration lacks a size, or has one that cannot be.
    """
    config = _of_text(config)
    config = {**_LEFT_OUT.get(str(config.get("model_type")), {}), **config}
    if config.get("index_topk") is not None:
        raise UnsupportedError(
            f"{name} uses sparse attention by an indexer (index_topk), which Lamina does not move and the planner does "
            "not describe; serve it without Lamina"
        )
    if (key := next((key for key in _OF_STATES if config.get(key) is not None), None)) is not None:
        raise UnsupportedError(
            f"{name} has layers that keep a state ({key}), whose weights and time the planner does not describe"
        )
    if (key := next((key for key in _OF_LAYERS if config.get(key)), None)) is not None:
        raise UnsupportedError(
            f"{name} has layers of other sizes ({key}), which the planner does not describe"
        )
    size = partial(_size, config, name)
    hidden, layers = size("hidden_size"), size("num_hidden_layers")
    vocabulary, intermediate = size("vocab_size"), size("intermediate_size")
    attention = _attention(config, name, hidden, layers)
    projections = (
        _latent_projections(config, name, hidden, layers)
        if config.get("kv_lora_rank")
        else sum(2 * hidden * k.count * k.head_size * (k.heads + k.kv_heads * k.stores) for k in attention)
    )
    # Gated feed-forward networks have three matrices; the older GELU ones (GPT-2, OPT, Falcon's line) two.
    gated = config.get("hidden_act", "silu") in ("silu", "swiglu", "gelu_pytorch_tanh", "geglu")
    matrices = 3 if gated else 2
    expert_size = size("moe_intermediate_size", 0)
    experts = _experts(config, name, layers, matrices * hidden * (expert_size or intermediate))
    moe_layers = experts.layers if experts else 0
    shared = size("shared_expert_intermediate_size", size("n_shared_experts", 0) * expert_size)
    if config.get("enable_moe_block") or config.get("model_type") == "llama4_text":
        shared = intermediate  # a dense network beside the routed experts
    routers = moe_layers * (hidden * experts.count + matrices * hidden * shared) if experts else 0
    plain = (layers - moe_layers) * matrices * hidden * size("intermediate_size_mlp", intermediate)
    by_layer = (
        size("hidden_size_per_layer_input", 0) * size("vocab_size_per_layer_input", vocabulary) * layers
    )
    dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    return Model(
        name=name,
        hidden=hidden,
        attention=attention,
        dense_params=projections + plain + routers + vocabulary * hidden,
        embedding_params=by_layer + (0 if config.get("tie_word_embeddings") else vocabulary * hidden),
        experts=experts,
        bytes_per_element=look_up("dtype", str(dtype).removeprefix("torch."), _DTYPE_BYTES),
        source=source,
    )


_TEXT_PARTS = ("thinker_config", "text_config", "language_config", "llm_config")
"""Under these names multimodal configurations have that of their language model, some one within another."""


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with what it says of its language model in the place of what it says of all."""
    for name in _TEXT_PARTS:
        part = config.get(name)
        if isinstance(part, dict):
            return _of_text({key: value for key, value in config.items() if key != name} | part)
    return config


def _latent_projections(config: Mapping[str, Any], name: str, hidden: int, layers: int) -> int:
    """Parameters of all layers' projections to q, to the latent row, from it to keys and values, and of the output."""
    size = partial(_size, config, name)
    heads, latent = size("num_attention_heads"), size("kv_lora_rank")
    value = size("v_head_dim", hidden // heads)
    plain, rotary, query_rank = size("qk_nope_head_dim"), size("qk_rope_head_dim"), size("q_lora_rank", 0)
    key = plain + rotary
    queries = query_rank * (hidden + heads * key) if query_rank else hidden * heads * key
    rows = hidden * (latent + rotary) + latent * heads * (plain + value)
    return layers * (queries + rows + heads * value * hidden)


def _attention(config: Mapping[str, Any], name: str, hidden: int, layers: int) -> tuple[AttentionLayers, ...]:
    """The kinds of attention layers, those without a window first."""
    size = partial(_size, config, name)
    heads = size("num_attention_heads")
    kv_heads = 1 if config.get("multi_query") else size("num_key_value_heads", heads)
    latent_size = size("kv_lora_rank", 0)
    if latent_size:
        rotary, value = size("qk_rope_head_dim"), size("v_head_dim", hidden // heads)
        key = size("qk_nope_head_dim") + rotary
        if config.get("model_type") in _EXPANDED:
            return (AttentionLayers(layers, heads, heads, key),)
        expanded = key + value
        return (
            AttentionLayers(
                layers, heads, 1, latent_size + rotary, latent_size=latent_size, expanded_size=expanded
            ),
        )
    head_size = size("head_dim", hidden // heads)
    # Layers without a window may have heads of their own.
    full_kv_heads, full_head_size = (
        size("num_global_key_value_heads", kv_heads),
        size("global_head_dim", head_size),
    )
    by_layer = config.get("num_attention_heads_per_layer") or [heads] * layers
    types = _layer_types(config, name, layers)
    if not isinstance(by_layer, list) or len(by_layer) != layers:
        raise ConfigError(
            f"num_attention_heads_per_layer of {name} must have {layers} entries, not {by_layer!r}"
        )
    windows = {
        _FULL: 0,
        _SLIDING: size("sliding_window", 0) if _SLIDING in types else 0,
        _CHUNKED: size("attention_chunk_size", 0) if _CHUNKED in types else 0,
    }
    per_layer = _per_layer(config, name)
    shared_from = layers - size("num_kv_shared_layers", 0)
    counts: Counter[AttentionLayers] = Counter()
    for number, (sees, own_heads) in enumerate(zip(types, by_layer, strict=True)):
        if sees not in windows:
            raise UnsupportedError(
                f"{name} has layers of the kind {sees!r}, which the planner does not describe"
            )
        own = partial(_size, per_layer.get(str(number), {}), name)
        kind = AttentionLayers(
            0,
            own("num_attention_heads", own_heads),
            own("num_key_value_heads", full_kv_heads if sees == _FULL else kv_heads),
            own("head_dim", full_head_size if sees == _FULL else head_size),
            windows[sees],
            number < shared_from,
        )
        counts[kind] += 1
    for kind in counts:
        if kind.heads % kind.kv_heads or kind.heads > hidden:
            raise ConfigError(
                f"{name} cannot have {kind.heads} attention heads with {kind.kv_heads} KV heads and a hidden size of "
                f"{hidden}"
            )
    kinds = (replace(kind, count=count) for kind, count in counts.items())
    return tuple(sorted(kinds, key=lambda kind: (kind.window, not kind.stores, kind.heads)))


def _per_layer(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What the configuration says of single layers, by their number as a string."""
    said = config.get("per_layer_config") or {}
    if not isinstance(said, dict) or not all(isinstance(own, dict) for own in said.values()):
        raise ConfigError(f"per_layer_config of {name} must hold an object for each layer, not {said!r}")
    if others := sorted({key for own in said.values() for key in own} - _OWN_SIZES):
        raise UnsupportedError(
            f"{name} has layers whose {', '.join(others)} differs, which the planner does not describe"
        )
    return said


def _layer_types(config: Mapping[str, Any], name: str, layers: int) -> list[str]:
    """What each layer sees: as the configuration says it, or as its class takes it where nothing is said."""
    if types := config.get("layer_types"):
        if not isinstance(types, list) or len(types) < layers:
            raise ConfigError(f"layer_types of {name} must have {layers} entries, not {types!r}")
        return types[:layers]
    size = partial(_size, config, name)
    if config.get("model_type") == "llama4_text":
        rotated = config.get("no_rope_layers") or [
            (i + 1) % size("no_rope_layer_interval") != 0 for i in range(layers)
        ]
        return [_CHUNKED if local else _FULL for local in rotated]
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return [_FULL] * layers
    every = size("sliding_window_pattern", 0)
    return [_FULL if every and (i + 1) % every == 0 else _SLIDING for i in range(layers)]


def _size(config: Mapping[str, Any], name: str, key: str, default: int | None = None) -> int:
    """A whole number above 0; the default where there is none, null or 0."""
    value = config.get(key) if default is None else config.get(key) or default
    if value is None:
        raise ConfigError(f"the configuration of {name} has no {key!r}; is it a decoder-only model?")
    if type(value) is not int or not (0 < value < 2**31 or value == default):
        raise ConfigError(f"{key} of {name} must be a whole number above 0, not {value!r}")
    return value


def _experts(config: Mapping[str, Any], name: str, layers: int, params: int) -> Experts | None:
    size = partial(_size, config, name)
    count = size("num_local_experts", size("num_experts", size("n_routed_experts", 0)))
    if not count:
        return None
    per_token = size("num_experts_per_tok", size("moe_topk", size("top_k_experts", 0)))
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"mlp_only_layers of {name} must be a list, not {dense!r}")
    dense_layers = size("first_k_dense_replace", len(dense))
    if every := size("interleave_moe_layer_step", 0):
        dense_layers = layers - layers // every
    if not 0 < per_token <= count or dense_layers > layers:
        raise ConfigError(
            f"the configuration of {name} has {count} experts in {layers} layers, but num_experts_per_tok is "
            f"{per_token} and {dense_layers} layers are without"
        )
    return Experts(count, per_token, params, layers - dense_layers)


def builtin_models() -> dict[str, Model]:
    """The models that ship with the planner, by short name."""
    return {
        key: model_from_config(table, table["name"], table["source"])
        for key, table in package_data("models.toml")["model"].items()
    }


def load_model(name: str) -> Model:
    """Read a model by short name (``llama3-70b``), from a ``config.json``, or from a directory that holds one.

    Raises
    ------
    ConfigError
        It is none of these, and the nearest names are given; or the file cannot be read.
    """
    path = Path(name)
    if os.path.isdir(path):  # False, not an error, for a name that no file can have
        path = path / "config.json"
    if path.suffix != ".json":
        return look_up("model", name, builtin_models())
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the model's configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object with the model's sizes")
    label = path.parent.name if path.name == "config.json" else path.stem.removesuffix("-config")
    return model_from_config(config, label or path.stem, str(path))
