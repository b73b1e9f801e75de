"""Lamina's statistics on their way from the scheduler to ``/metrics``.

vLLM's ``vllm.stat_logger_plugins`` would be the extension point. It is loaded for every server of an environment in
which the plugin is installed, whatever its executor, and turns statistics on where ``--disable-log-stats`` turned them
off; and ``LLM`` does not load it. So the manager of vLLM's own loggers gets one more, for engines of Lamina alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm.config import VllmConfig

from vllm_lamina.compat.config import facts_of

_KEY = "lamina"


def log_lamina_stats(config: VllmConfig, make_logger: Callable[[VllmConfig, Sequence[int]], Any]) -> None:
    """Let the front ends that are built from ``config`` record their statistics with Lamina's logger too.

    It is made, of the configuration and the engines' indexes, after vLLM's, which take all ``vllm:`` metrics off the
    registry, and comes before them.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    facts_of(config).logs_stats = True
    if hasattr(StatLoggerManager, "lamina_wrapped"):
        return
    StatLoggerManager.lamina_wrapped = True
    init = StatLoggerManager.__init__

    @functools.wraps(init)
    def init_with_lamina(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        if facts_of(vllm_config).logs_stats:
            self.stat_loggers.insert(0, make_logger(vllm_config, self.engine_indexes))

    StatLoggerManager.__init__ = init_with_lamina


def attach_stats(scheduler_stats: Any, stats: dict[str, Any]) -> None:
    """Let ``SchedulerStats`` carry ours, plain data, across processes too.

    Its only field of any shape is that for a KV connector's; Lamina's engines have no KV connector.
    """
    scheduler_stats.kv_connector_stats = {_KEY: stats}


def detach_stats(scheduler_stats: Any) -> dict[str, Any] | None:
    """Take ours out of ``SchedulerStats``; None where it carries none."""
    carried = scheduler_stats.kv_connector_stats if scheduler_stats is not None else None
    if not carried or _KEY not in carried:
        return None
    scheduler_stats.kv_connector_stats = None
    stats: dict[str, Any] = carried[_KEY]
    return stats


def is_first_front_end(config: VllmConfig) -> bool:
    """Whether this is the one front end of its engine, or the first of several (``--api-server-count``)."""
    return int(config.parallel_config._api_process_rank) <= 0


def add_to_histogram(histogram: Any, counts: Sequence[int], total: float) -> None:
    """Add many observations to a Prometheus histogram: how many are in each bucket, +Inf included, and their sum.

    ``observe`` takes one at a time, and a step has as many as the model has layers.
    """
    histogram._sum.inc(total)
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)
