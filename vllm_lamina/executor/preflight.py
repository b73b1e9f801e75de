"""What can be found out before any process starts, so that an error is the last line that the user reads."""

from __future__ import annotations

from typing import Any

from vllm_lamina._native import ModelGeometry, kv_block_bytes
from vllm_lamina.config import AUTO, LaminaConfig
from vllm_lamina.errors import ConfigError
from vllm_lamina.support import check_engine_config
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.units import format_bytes, parse_bytes
from vllm_lamina.worker.capacity import check_holds_one_request
from vllm_lamina.worker.host import cgroup_memory, memory_total


def check_before_start(config: Any) -> None:
    """Refuse a ``VllmConfig`` that cannot work with Lamina.

    Raises
    ------
    LaminaError
        A feature is not supported, the attention worker does not answer, or its pool is too small.
    """
    check_engine_config(config)
    options = LaminaConfig.from_additional_config(config.additional_config)
    pool_bytes = None
    if options.workers:
        with AttentionWorkerConnection.connect(options.workers) as worker:
            pool_bytes = worker.pool_bytes
    elif options.memory != AUTO:
        pool_bytes = parse_bytes(options.memory)
        _check_this_host_has(pool_bytes)
    model = config.model_config
    # With a length of -1 vLLM fits the length to the pool.
    if pool_bytes is not None and model.original_max_model_len != -1:
        block_size = config.cache_config.block_size
        check_holds_one_request(pool_bytes, _block_bytes(config, block_size), block_size, model.max_model_len)


def _check_this_host_has(pool_bytes: int) -> None:
    """The system hands memory out page by page, so a pool that cannot fit would end the worker much later."""
    limit = min([memory_total(), *(limit for limit, _ in cgroup_memory())])
    if pool_bytes > limit:
        raise ConfigError(
            f"lamina option 'memory': {format_bytes(pool_bytes)} is more than this host has, or allows this process: "
            f"{format_bytes(limit)}"
        )


def _block_bytes(config: Any, block_size: int) -> int:
    model, parallel = config.model_config, config.parallel_config
    geometry = ModelGeometry(
        block_size,
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
        model.get_head_size(),
        str(model.dtype).removeprefix("torch."),
        [1.0] * model.get_num_layers(parallel),
    )
    return kv_block_bytes(geometry)
