"""Where an engine's attention workers come from; `base` is what the engine needs to know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_lamina.executor.sources.base import AttentionWorkerSource
from vllm_lamina.executor.sources.embedded import EmbeddedSource
from vllm_lamina.executor.sources.named import NamedSource
from vllm_lamina.executor.sources.on_ray import RaySource

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_lamina.config import LaminaConfig


def source_for(config: VllmConfig, options: LaminaConfig) -> AttentionWorkerSource:
    """Where the attention workers of an engine come from, by its options.

    Raises
    ------
    ConfigError
        As `RaySource`.
    """
    num_ranks = config.parallel_config.tensor_parallel_size
    if options.ray:
        return RaySource(options, num_ranks)
    if options.workers:
        return NamedSource(options, num_ranks)
    return EmbeddedSource(options, num_ranks, config.cache_config.kv_cache_memory_bytes)
