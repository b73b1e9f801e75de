"""What can be found out before any process starts, so that an error is the last line that the user reads."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from vllm_lamina.compat.config import settle_block_size
from vllm_lamina.compat.geometry import geometry_of
from vllm_lamina.compat.kv_cache import fits_length_to_pool
from vllm_lamina.config import LaminaConfig
from vllm_lamina.executor.sources import source_for
from vllm_lamina.support import check_engine_config

logger = init_logger("vllm.lamina")

BLOCK_SIZE = 128
"""Tokens in a KV block where the user does not say."""


def check_before_start(config: Any) -> None:
    """Settle what the user left open in a ``VllmConfig``, and refuse one that cannot work with Lamina.

    Raises
    ------
    LaminaError
        A feature is not supported, an attention worker does not answer, or a pool is too small.
    """
    if settle_block_size(config, BLOCK_SIZE):
        logger.info("Lamina: KV blocks hold %d tokens (--block-size).", BLOCK_SIZE)
    check_engine_config(config)
    source = source_for(config, LaminaConfig.from_additional_config(config.additional_config))
    model = config.model_config
    for partition in source.check(geometry_of(config), model.max_model_len):
        if not fits_length_to_pool(model):
            partition.check_holds_one_request(model.max_model_len)
