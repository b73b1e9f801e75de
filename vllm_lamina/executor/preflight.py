"""What can be found out before any process starts, so that an error is the last line that the user reads."""

from __future__ import annotations

from typing import Any

from vllm_lamina._native import kv_block_bytes
from vllm_lamina.config import AUTO, LaminaConfig
from vllm_lamina.errors import ConfigError
from vllm_lamina.host import cgroup_memory, memory_total
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.kv_cache.partition import Pool, divide
from vllm_lamina.ray.driver import addresses_on_ray
from vllm_lamina.support import check_engine_config
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.units import format_bytes, parse_bytes
from vllm_lamina.worker.model_worker.attention_workers import workers_by_rank


def check_before_start(config: Any) -> None:
    """Refuse a ``VllmConfig`` that cannot work with Lamina.

    Raises
    ------
    LaminaError
        A feature is not supported, an attention worker does not answer, or a pool is too small.
    """
    check_engine_config(config)
    options = LaminaConfig.from_additional_config(config.additional_config)
    pools = []
    num_ranks = config.parallel_config.tensor_parallel_size
    addresses = addresses_on_ray(options, num_ranks) if options.ray else options.worker_addresses
    for address in addresses:
        with AttentionWorkerConnection.connect(address, secret_file=options.secret_file) as worker:
            worker.check_available(options.transport)
            pools.append(Pool(address, worker.pool_bytes))
    if not pools and options.memory != AUTO:
        memory = parse_bytes(options.memory)
        _check_this_host_has(memory)
        pools = [Pool("", memory // num_ranks)] * num_ranks
    if not pools:
        return
    model = config.model_config
    for of_rank in workers_by_rank(pools, num_ranks):
        partition = divide(
            options.partition,
            of_rank,
            _geometry(config),
            lambda worker, geometry: kv_block_bytes(geometry.to_native()),
            model.max_model_len,
        )
        # With a length of -1 vLLM fits the length to the pool.
        if model.original_max_model_len != -1:
            partition.check_holds_one_request(model.max_model_len)


def _check_this_host_has(pool_bytes: int) -> None:
    """The system hands memory out page by page, so a pool that cannot fit would end the worker much later."""
    limit = min([memory_total(), *(limit for limit, _ in cgroup_memory())])
    if pool_bytes > limit:
        raise ConfigError(
            f"lamina option 'memory': {format_bytes(pool_bytes)} is more than this host has, or allows this process: "
            f"{format_bytes(limit)}"
        )


def _geometry(config: Any) -> Geometry:
    model, parallel = config.model_config, config.parallel_config
    num_layers = model.get_num_layers(parallel)
    return Geometry(
        num_layers=num_layers,
        block_size=config.cache_config.block_size,
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=str(model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        scales=(1.0,) * num_layers,
    )
