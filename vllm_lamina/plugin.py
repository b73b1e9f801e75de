"""Entry points through which vLLM finds Lamina; nothing changes for an engine that does not select it."""

from collections.abc import Sequence
from typing import Any


def platform_plugin() -> None:
    """Offer ``--executor lamina``: vLLM asks platform plugins before it imports its engine arguments.

    Returning None says that this is not a platform, so that vLLM goes on with its own.
    """
    from vllm_lamina.compat import arguments

    arguments.install(_check, _prepare)


def general_plugin() -> None:
    """Offer ``--executor lamina`` where vLLM was told its platform and asked no platform plugin."""
    platform_plugin()


def _check(arguments: Any) -> None:
    """Check ``EngineArgs`` that select Lamina."""
    from vllm_lamina.support import check_engine_arguments

    check_engine_arguments(arguments)


def _prepare(config: Any) -> None:
    """Check a ``VllmConfig`` that selects Lamina; let its front ends check requests and show Lamina's statistics."""
    from vllm_lamina.compat.requests import refuse_fatal_requests
    from vllm_lamina.compat.stat_loggers import log_lamina_stats
    from vllm_lamina.executor.preflight import check_before_start

    check_before_start(config)
    refuse_fatal_requests(config)
    log_lamina_stats(config, _stat_logger)


def _stat_logger(config: Any, engine_indexes: Sequence[int]) -> Any:
    from vllm_lamina.metrics.logger import LaminaStatLogger

    return LaminaStatLogger(config, engine_indexes)
