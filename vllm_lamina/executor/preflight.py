"""What can be found out before any process starts, so that an error is the last line that the user reads."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from vllm_lamina.compat.config import (
    settle_attention_backend,
    settle_batches,
    settle_block_size,
    settle_scheduler,
    settle_whole_inputs,
)
from vllm_lamina.compat.geometry import geometry_of
from vllm_lamina.compat.kv_cache import fits_length_to_pool
from vllm_lamina.config import LaminaConfig
from vllm_lamina.device import device_for
from vllm_lamina.executor.sources import source_for
from vllm_lamina.support import check_engine_config

logger = init_logger("vllm.lamina")

BLOCK_SIZE = 128
"""Tokens in a KV block where the user does not say."""

SCHEDULER = "vllm_lamina.scheduler.scheduler.LaminaScheduler"


def check_before_start(config: Any) -> None:
    """Settle what the user left open in a ``VllmConfig``, and refuse one that cannot work with Lamina.

    Raises
    ------
    LaminaError
        A feature is not supported, an attention worker does not answer, or a pool is too small.
    """
    settle(config)
    check_engine_config(config)
    options = LaminaConfig.from_additional_config(config.additional_config)
    source = source_for(config, options)
    model = config.model_config
    sharing = options.ranks_sharing_memory(config.parallel_config.tensor_parallel_size)
    for partition in source.check(geometry_of(config), model.max_model_len):
        if not fits_length_to_pool(model):
            partition.check_holds_one_request(model.max_model_len, sharing, config.max_in_flight_tokens)


def settle(config: Any) -> None:
    """Set in a ``VllmConfig`` what Lamina needs and the user left open, each with a line in the log; once is enough.

    Raises
    ------
    ConfigError
        There is another scheduler.
    """
    if settle_block_size(config, BLOCK_SIZE):
        logger.info("Lamina: KV blocks hold %d tokens (--block-size).", BLOCK_SIZE)
    device = device_for(config.device_config.device_type)
    if device.backend_is_asked_for and settle_attention_backend(config, device.backend_name):
        logger.info(
            "Lamina: its own attention backend is used (--attention-backend %s).", device.backend_name
        )
    if device.backend_is_asked_for and settle_batches(config):
        logger.info(
            "Lamina: one batch is in flight, for tensor parallelism on GPUs has one at a time (--lamina-batches 1)."
        )
    if settle_whole_inputs(config):
        logger.info(
            "Lamina: this model's images see their own tokens whole, so none is cut by prefill chunks "
            "(--disable-chunked-mm-input)."
        )
    if settle_scheduler(config, SCHEDULER):
        logger.info("Lamina: its own scheduler is used (--scheduler-cls %s).", SCHEDULER)
