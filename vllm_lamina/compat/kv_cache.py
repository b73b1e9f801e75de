"""vLLM's side of a KV cache that is elsewhere: which layers it has, and what vLLM counts and allocates for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_lamina.errors import UnsupportedError
from vllm_lamina.support import WITHOUT_LAMINA


def layers_of(kv_cache_config: Any) -> Sequence[str]:
    """The layers of a ``KVCacheConfig``, whose KV is all of one kind.

    Raises
    ------
    UnsupportedError
        It is not.
    """
    if len(kv_cache_config.kv_cache_groups) != 1:
        raise UnsupportedError(
            f"Lamina does not support models whose layers need different kinds of KV cache: {WITHOUT_LAMINA}."
        )
    names: Sequence[str] = kv_cache_config.kv_cache_groups[0].layer_names
    return names


def counted_bytes(specs: Iterable[Any], num_blocks: int) -> int:
    """Bytes of so many blocks of all layers as vLLM counts them, by the layers' ``KVCacheSpec``.

    Its page size knows nothing of the padding in the attention worker's layout.
    """
    return num_blocks * int(sum(spec.page_size_bytes for spec in specs))


def without_tensors(kv_cache_config: Any) -> Any:
    """The same ``KVCacheConfig``, of which vLLM allocates nothing."""
    return dataclasses.replace(kv_cache_config, kv_cache_tensors=[])


def allocated_bytes(model_runner: Any) -> int:
    """Bytes of KV cache that a model runner holds itself."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model_runner.kv_caches)


def fits_length_to_pool(model_config: Any) -> bool:
    """Whether vLLM was asked to choose the longest request by what the KV cache holds (``--max-model-len -1``)."""
    return bool(model_config.original_max_model_len == -1)


def warm_up_on_cpu(worker: Any) -> None:
    """Compile a CPU worker's model, which vLLM does while it determines the memory for the KV cache."""
    if worker._should_warm_up_model():
        worker.model_runner.warming_up_model()
