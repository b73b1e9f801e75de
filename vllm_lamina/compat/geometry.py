"""The KV cache's geometry by vLLM: as the configuration says it, and as the layers of a loaded model say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_lamina.compat.attention import check_spec
from vllm_lamina.compat.latent_attention import head_sizes
from vllm_lamina.compat.states import is_state
from vllm_lamina.errors import UnsupportedError
from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, LayerSpec
from vllm_lamina.support import WITHOUT_LAMINA

# Since 0.33 vLLM plans its KV cache in a module of its own.
_PLANNING = "vllm.v1.core.kv_cache_planning"
_planning = import_module(_PLANNING if find_spec(_PLANNING) else "vllm.v1.core.kv_cache_utils")


def geometry_of(config: VllmConfig) -> Geometry | None:
    """The geometry of one rank of a model that need not be loaded yet; its scales, which layers choose, are 1.

    None where layers may be of several kinds: only the loaded model says of which.
    """
    model, parallel = config.model_config, config.parallel_config
    if not _layers_are_alike(model):
        return None
    num_layers = model.get_num_layers_by_block_type(parallel, "attention")
    head_size, latent_size = head_sizes(model)
    return Geometry.uniform(
        num_layers=num_layers,
        block_size=config.cache_config.block_size,
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=head_size,
        dtype=_name(model.dtype),
        scales=(1.0,) * num_layers,
        latent_size=latent_size,
    )


def _layers_are_alike(model: Any) -> bool:
    """Whether nothing in the configuration tells one attention layer from another."""
    text = model.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    told = (
        "attention_chunk_size",
        "num_kv_shared_layers",
        "num_attention_heads_per_layer",
        "hybrid_layer_pattern",
    )
    return (
        not model.is_hybrid
        and len(kinds) <= 1
        and "sliding_attention" not in kinds
        and model.get_sliding_window() is None
        and not any(getattr(text, name, None) for name in told)
        # Keys and values in place of a latent row have sizes that vLLM does not know of each of these models.
        and (model.use_mla or not getattr(text, "kv_lora_rank", None))
        and model.model_arch_config.per_layer_overrides is None
        and not model.has_noops
    )


def groups_of(config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> Sequence[KVCacheGroupSpec]:
    """The KV cache groups that vLLM's engine will make of the layers' specs."""
    groups: Sequence[KVCacheGroupSpec] = _planning.get_kv_cache_groups(config, dict(specs))
    return groups


def kv_groups(groups: Sequence[KVCacheGroupSpec]) -> tuple[int, ...]:
    """Those of the groups, by their number, whose layers keep k and v: the others keep states."""
    return tuple(number for number, group in enumerate(groups) if not is_state(group.kv_cache_spec))


def counted_bytes(groups: Sequence[KVCacheGroupSpec], num_blocks: int) -> int:
    """Bytes of so many blocks as vLLM counts them: the groups overlay one another, and the largest counts.

    Its page size knows nothing of the padding in the attention worker's layout.
    """
    sizes = (sum(spec_of(group, name).page_size_bytes for name in group.layer_names) for group in groups)
    return num_blocks * int(max(sizes))


def spec_of(group: KVCacheGroupSpec, name: str) -> Any:
    """The KV cache spec of a layer of a group."""
    spec = group.kv_cache_spec
    return spec.kv_cache_specs[name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def geometry_of_layers(
    config: VllmConfig, groups: Sequence[KVCacheGroupSpec]
) -> tuple[Sequence[str], Geometry]:
    """The names of a loaded model's attention layers, in the model's order, and their geometry.

    Raises
    ------
    UnsupportedError
        A layer is of a kind that is not served, or does not see what its KV cache spec keeps for it.
    """
    places = {
        name: (number, position, spec_of(group, name))
        for number, group in enumerate(groups[index] for index in kv_groups(groups))
        for position, name in enumerate(group.layer_names)
    }
    names: list[str] = []
    layers: list[LayerSpec] = []
    caches: dict[CacheSpec, int] = {}
    for name, layer in config.compilation_config.static_forward_context.items():
        shared = getattr(layer, "kv_sharing_target_layer_name", None)
        if (shared or name) not in places:
            continue
        group, position, spec = places[shared or name]
        check_spec(name, spec)
        shape = layer.impl.shape
        # A full attention spec keeps every token: where a group has one for all, it names the window of some of them.
        limits = {"sliding_window": shape.window, "attention_chunk_size": shape.chunk}
        for kept, seen in limits.items() if not isinstance(spec, FullAttentionSpec) else ():
            if (getattr(spec, kept, None) or seen) != seen:
                raise UnsupportedError(
                    f"Lamina does not support models whose layers see other tokens than their KV cache keeps: "
                    f"{kept} of {name} is {seen}, of its KV cache {getattr(spec, kept)}: {WITHOUT_LAMINA}."
                )
        latent = isinstance(spec, MLAAttentionSpec)
        cache = CacheSpec(
            spec.block_size,
            spec.num_kv_heads,
            spec.head_size,
            layer.impl.kv_lora_rank if latent else spec.head_size_v,
            _name(spec.dtype),
            latent,
        )
        names.append(name)
        layers.append(
            LayerSpec(
                cache=caches.setdefault(cache, len(caches)),
                group=group,
                position=position,
                num_heads=shape.num_heads,
                scale=shape.scale,
                window=shape.window,
                chunk=shape.chunk,
                soft_cap=shape.soft_cap,
                sinks=_by_head(shape.sinks),
                alibi_slopes=_by_head(shape.alibi_slopes),
                stores=shared is None,
            )
        )
    return names, Geometry(tuple(caches), tuple(layers))


def _by_head(values: torch.Tensor | None) -> tuple[float, ...]:
    return () if values is None else tuple(values.float().tolist())


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
