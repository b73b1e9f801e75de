"""Describes a model by what costs time and memory: its parameters, its KV cache and its traffic per token."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vllm_lamina.errors import ConfigError, UnsupportedError
from vllm_lamina.planner.devices import Array, look_up, package_data


@dataclass(frozen=True)
class Experts:
    """The routed experts of a mixture-of-experts model.

    Attributes
    ----------
    count, per_token
        Experts of a layer, and how many of them each token visits.
    params
        Parameters of one expert of one layer.
    layers
        Layers that have routed experts.
    """

    count: int
    per_token: int
    params: int
    layers: int

    def touched(self, tokens: ArrayLike) -> Array:
        """Experts of a layer expected to be read by a batch, if the router is uniform and independent.

        Each token leaves a given expert out with probability ``1 - per_token / count``.
        """
        miss = 1.0 - self.per_token / self.count
        return self.count * (1.0 - miss ** np.asarray(tokens, dtype=np.float64))


@dataclass(frozen=True)
class Model:
    """A decoder-only model.

    Attributes
    ----------
    name
        For people.
    layers, hidden, heads, kv_heads, head_size
        The attention's shape: L, d, query heads, KV heads, elements of one head.
    latent_size
        With multi-head latent attention: elements at the front of a token's latent row that are its values, where the
        row, of ``head_size``, is its one key. 0: values of their own, of ``head_size``.
    expanded_size
        Then, elements of one head's key and value together, as prompts are attended.
    dense_params
        Parameters that every token multiplies with: all but routed experts and the input embedding.
    embedding_params
        Input embedding, which occupies memory and is looked up, not multiplied with. 0 if tied to the LM head.
    experts
        Routed experts, or None for a dense model.
    bytes_per_element
        e: of weights, activations and KV cache alike (2 for 16 bit).
    source
        Where the description comes from.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    dense_params: int
    embedding_params: int
    experts: Experts | None = None
    bytes_per_element: int = 2
    source: str = ""
    latent_size: int = 0
    expanded_size: int = 0

    @property
    def group(self) -> int:
        """G: query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory."""
        routed = self.experts.count * self.experts.params * self.experts.layers if self.experts else 0
        return self.bytes_per_element * (self.dense_params + self.embedding_params + routed)

    @property
    def active_params(self) -> int:
        """N: parameters that one token multiplies with."""
        routed = self.experts.per_token * self.experts.params * self.experts.layers if self.experts else 0
        return self.dense_params + routed

    def streamed_bytes(self, tokens: ArrayLike) -> Array:
        """Bytes of weights that a step over so many tokens reads from memory."""
        dense = np.full_like(np.asarray(tokens, dtype=np.float64), self.bytes_per_element * self.dense_params)
        if self.experts is None:
            return dense
        return (
            dense
            + self.bytes_per_element
            * self.experts.params
            * self.experts.layers
            * self.experts.touched(tokens)
        )

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's q in one layer: e d where heads * head_size = d."""
        return self.bytes_per_element * self.heads * self.head_size

    @property
    def output_bytes(self) -> int:
        """Bytes of one token's attention output in one layer: as q, or what is latent of it."""
        return self.bytes_per_element * self.heads * self._value_size

    @property
    def key_value_bytes(self) -> int:
        """Bytes of one token's k and v together in one layer: 2 e d / G, or of its latent row."""
        return self.bytes_per_element * self._kept_elements

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token occupies in the KV cache: 2 e d L / G, or those of latent rows."""
        return self.layers * self.key_value_bytes

    @property
    def wire_bytes_per_token(self) -> int:
        """Bytes that one token's decode step moves: ``(2 + 2/G) e d L`` (arXiv 2405.01814, section 3)."""
        return self.layers * (self.query_bytes + self.output_bytes + self.key_value_bytes)

    @property
    def attention_flops_per_cached_token(self) -> int:
        """FLOP of one query token against one cached token, all layers: a product with k and one with v."""
        return 2 * self.layers * self.heads * (self.head_size + self._value_size)

    @property
    def prefill_flops_per_cached_token(self) -> int:
        """The same of a prompt's token, for which keys and values are expanded where they are latent."""
        if not self.expanded_size:
            return self.attention_flops_per_cached_token
        return 2 * self.layers * self.heads * self.expanded_size

    @property
    def key_value_projection_share(self) -> float:
        """Fraction of the active parameters that project to what is kept of a token."""
        return self.layers * self.hidden * self._kept_elements / self.active_params

    @property
    def _value_size(self) -> int:
        return self.latent_size or self.head_size

    @property
    def _kept_elements(self) -> int:
        return self.kv_heads * self.head_size * (1 if self.latent_size else 2)


_DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


_TEXT_PARTS = ("thinker_config", "text_config", "language_config", "llm_config")
"""Under these names multimodal configurations have that of their language model, some one within another."""


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with what it says of its language model in the place of what it says of all."""
    for name in _TEXT_PARTS:
        part = config.get(name)
        if isinstance(part, dict):
            return _of_text({key: value for key, value in config.items() if key != name} | part)
    return config


def model_from_config(config: Mapping[str, Any], name: str, source: str = "") -> Model:
    """Read a Hugging Face ``config.json``: dense or MoE; multi-head, grouped-query, multi-query or latent attention.

    Raises
    ------
    UnsupportedError
        The attention is not of that kind (an indexer's sparse attention).
    ConfigError
        The configuration lacks a size, or has one that cannot be.
    """
    config = _of_text(config)
    if config.get("index_topk") is not None:
        raise UnsupportedError(
            f"{name} uses sparse attention by an indexer (index_topk), which Lamina does not move and the planner does "
            "not describe; serve it without Lamina"
        )
    size = partial(_size, config, name)
    hidden, layers, heads = size("hidden_size"), size("num_hidden_layers"), size("num_attention_heads")
    vocabulary, intermediate = size("vocab_size"), size("intermediate_size")
    kv_heads = 1 if config.get("multi_query") else size("num_key_value_heads", heads)
    if heads % kv_heads or heads > hidden:
        raise ConfigError(
            f"{name} cannot have {heads} attention heads with {kv_heads} KV heads and a hidden size of {hidden}"
        )
    latent_size = size("kv_lora_rank", 0)
    expanded_size = 0
    if latent_size:
        rotary, value = size("qk_rope_head_dim"), size("v_head_dim")
        key, query_rank = size("qk_nope_head_dim") + rotary, size("q_lora_rank", 0)
        kv_heads, head_size, expanded_size = 1, latent_size + rotary, key + value
        queries = query_rank * (hidden + heads * key) if query_rank else hidden * heads * key
        latent = hidden * head_size + latent_size * heads * (expanded_size - rotary)
        attention = queries + latent + heads * value * hidden
    else:
        head_size = size("head_dim", hidden // heads)
        attention = 2 * hidden * heads * head_size + 2 * hidden * kv_heads * head_size
    # Gated feed-forward networks have three matrices; the older GELU ones (GPT-2, OPT, Falcon's line) two.
    gated = config.get("hidden_act", "silu") in ("silu", "swiglu", "gelu_pytorch_tanh", "geglu")
    matrices = 3 if gated else 2
    expert_size = size("moe_intermediate_size", 0)
    experts = _experts(config, name, layers, matrices * hidden * (expert_size or intermediate))
    moe_layers = experts.layers if experts else 0
    shared = size("shared_expert_intermediate_size", size("n_shared_experts", 0) * expert_size)
    routers = moe_layers * (hidden * experts.count + matrices * hidden * shared) if experts else 0
    dense = layers * attention + (layers - moe_layers) * matrices * hidden * intermediate + routers
    dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    return Model(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        dense_params=dense + vocabulary * hidden,
        embedding_params=0 if config.get("tie_word_embeddings") else vocabulary * hidden,
        experts=experts,
        bytes_per_element=look_up("dtype", str(dtype).removeprefix("torch."), _DTYPE_BYTES),
        source=source,
        latent_size=latent_size,
        expanded_size=expanded_size,
    )


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
    per_token = size("num_experts_per_tok", size("moe_topk", 0))
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"mlp_only_layers of {name} must be a list, not {dense!r}")
    dense_layers = size("first_k_dense_replace", len(dense))
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
