"""The KV cache's geometry by vLLM: as the configuration says it, and as the layers of a loaded model say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_lamina.compat.attention import check_spec
from vllm_lamina.errors import UnsupportedError
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.support import WITHOUT_LAMINA


def geometry_of(config: VllmConfig) -> Geometry:
    """The geometry of one rank of a model that need not be loaded yet; its scales, which layers choose, are 1."""
    model, parallel = config.model_config, config.parallel_config
    num_layers = model.get_num_layers_by_block_type(parallel, "attention")
    return Geometry.uniform(
        num_layers=num_layers,
        block_size=config.cache_config.block_size,
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=str(model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        scales=(1.0,) * num_layers,
    )


def geometry_of_layers(config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> Geometry:
    """The same with the scales of the loaded layers, which must be as the configuration says.

    Parameters
    ----------
    specs
        By layer, in their order.

    Raises
    ------
    UnsupportedError
        A layer is of another kind or shape; the text says what differs.
    """
    expected = geometry_of(config)
    if len(specs) != expected.num_layers:
        raise UnsupportedError(
            f"Lamina does not support models with {len(specs)} attention layers where their configuration says "
            f"{expected.num_layers}: {WITHOUT_LAMINA}."
        )
    scales = []
    for name, spec in specs.items():
        layer: Any = config.compilation_config.static_forward_context[name]
        check_spec(name, spec)
        found = {
            "block_size": spec.block_size,
            "num_heads": layer.num_heads,
            "num_kv_heads": spec.num_kv_heads,
            "head_size": spec.head_size,
            "dtype": str(spec.dtype).removeprefix("torch."),
        }
        cache, first = expected.caches[0], expected.layers[0]
        said = {
            "block_size": cache.block_size,
            "num_heads": first.num_heads,
            "num_kv_heads": cache.num_kv_heads,
            "head_size": cache.head_size,
            "dtype": cache.dtype,
        }
        for field, value in found.items():
            if value != said[field]:
                raise UnsupportedError(
                    f"Lamina does not support models whose attention layers differ from each other or from their "
                    f"configuration: {field} of {name} is {value}, by the configuration {said[field]}: "
                    f"{WITHOUT_LAMINA}."
                )
        scales.append(layer.impl.scale)
    layers = (
        msgspec.structs.replace(layer, scale=scale)
        for layer, scale in zip(expected.layers, scales, strict=True)
    )
    return Geometry(expected.caches, tuple(layers))
