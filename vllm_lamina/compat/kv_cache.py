"""vLLM's side of a KV cache that is elsewhere: what vLLM allocates for it."""

from __future__ import annotations

import dataclasses
from typing import Any


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
