"""vLLM's side of a KV cache that is elsewhere: what vLLM allocates for it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from vllm.config import VllmConfig


def without_tensors(kv_cache_config: Any, vllm_config: VllmConfig) -> Any:
    """The same ``KVCacheConfig``, of which vLLM allocates nothing.

    Layers that share another's KV are in that one's group, where vLLM would put them. It would also look for that one's
    tensor, so that it does not hear of the sharing any more.
    """
    # It imports kernels, which who only checks a configuration need not have.
    from vllm.v1.worker.utils import add_kv_sharing_layers_to_kv_cache_groups

    groups = copy.deepcopy(kv_cache_config.kv_cache_groups)
    shared = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if target := getattr(layer, "kv_sharing_target_layer_name", None):
            shared[name] = target
            layer.kv_sharing_target_layer_name = None
    add_kv_sharing_layers_to_kv_cache_groups(shared, groups)
    return dataclasses.replace(kv_cache_config, kv_cache_tensors=[], kv_cache_groups=groups)


def expect_no_kv(model_runner: Any) -> None:
    """Let a model runner look for no KV: not for that of shared layers, which V1 has found out already, and not for
    blocks that it might zero.
    """
    model_runner.shared_kv_cache_layers = {}
    model_runner._init_kv_zero_meta = lambda: None


def allocated_bytes(model_runner: Any) -> int:
    """Bytes of KV cache and states that a model runner holds itself."""
    storages = (tensor.untyped_storage() for tensor in model_runner.kv_caches)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def fits_length_to_pool(model_config: Any) -> bool:
    """Whether vLLM was asked to choose the longest request by what the KV cache holds (``--max-model-len -1``)."""
    return bool(model_config.original_max_model_len == -1)


def warm_up_on_cpu(worker: Any) -> None:
    """Compile a CPU worker's model, which vLLM does while it determines the memory for the KV cache."""
    if worker._should_warm_up_model():
        worker.model_runner.warming_up_model()
