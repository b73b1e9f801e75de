"""The interfaces of vLLM and prometheus_client by which Lamina's metrics reach `/metrics`."""

from __future__ import annotations

import dataclasses
import inspect
import pickle

from prometheus_client import CollectorRegistry, Histogram
from vllm.config import ParallelConfig, VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics import loggers, prometheus
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_lamina.compat.config import facts_of
from vllm_lamina.compat.stat_loggers import (
    add_to_histogram,
    attach_stats,
    detach_stats,
    log_lamina_stats,
)
from vllm_lamina.metrics.engine import EngineMetrics
from vllm_lamina.metrics.logger import LaminaStatLogger


def test_statistics_cross_processes_in_the_field_for_a_kv_connectors() -> None:
    """Relies on ``SchedulerStats.kv_connector_stats`` being a dictionary of any shape, None without a KV connector."""
    stats = EngineMetrics().take(["memory-1:7100"], [0.5], 2)
    carrier = SchedulerStats()
    assert carrier.kv_connector_stats is None
    attach_stats(carrier, stats)
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=carrier))
    received = MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats
    assert detach_stats(received) == stats
    assert received == SchedulerStats(), "vLLM's loggers would see what is not theirs"
    assert detach_stats(received) is None
    assert detach_stats(None) is None


def test_the_statistics_of_a_real_kv_connector_stay() -> None:
    carrier = SchedulerStats(kv_connector_stats={"transfers": 1})
    assert detach_stats(carrier) is None
    assert carrier.kv_connector_stats == {"transfers": 1}


def test_the_scheduler_makes_statistics_in_a_method_of_its_own() -> None:
    """Relies on ``Scheduler.make_stats``, called by ``update_from_output``, and on the usage in what it returns."""
    assert "self.make_stats(" in inspect.getsource(Scheduler.update_from_output)
    assert "kv_cache_usage" in {field.name for field in dataclasses.fields(SchedulerStats)}
    assert [*inspect.signature(Scheduler.update_from_output).parameters] == [
        "self",
        "scheduler_output",
        "model_runner_output",
    ]


def test_the_manager_of_loggers_takes_one_more() -> None:
    """Relies on ``StatLoggerManager.__init__(vllm_config, ...)``, its ``stat_loggers``, asked in their order with these
    arguments, and ``engine_indexes``.
    """
    manager = loggers.StatLoggerManager
    assert [*inspect.signature(manager.__init__).parameters][:2] == ["self", "vllm_config"]
    init, record = inspect.getsource(inspect.unwrap(manager.__init__)), inspect.getsource(manager.record)
    assert "self.stat_loggers" in init
    assert "self.engine_indexes" in init
    assert "for stat_logger in self.stat_loggers" in record
    assert {"record", "log_engine_initialized"} <= loggers.AggregateStatLoggerBase.__abstractmethods__
    parameters = [*inspect.signature(loggers.StatLoggerBase.record).parameters]
    assert parameters == ["self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"]


def test_vllms_own_logger_clears_the_registry_when_it_is_made() -> None:
    """Which is why Lamina's metrics are registered after it, and need not be unregistered for the next engine."""
    assert "unregister_vllm_metrics()" in inspect.getsource(loggers.PrometheusStatLogger.__init__)
    assert 'startswith("vllm:")' in inspect.getsource(prometheus.unregister_vllm_metrics)


def test_what_the_configuration_is_told_reaches_the_engines_process() -> None:
    """Relies on ``VllmConfig`` keeping attributes that are not its fields, also when it is pickled."""
    config = VllmConfig()
    assert not facts_of(config).logs_stats
    log_lamina_stats(config, LaminaStatLogger)
    assert facts_of(pickle.loads(pickle.dumps(config))).logs_stats
    assert not facts_of(VllmConfig()).logs_stats


def test_api_servers_have_numbers() -> None:
    """Relies on ``ParallelConfig._api_process_rank``: 0 where there is one."""
    assert ParallelConfig._api_process_rank == 0


def test_many_observations_at_once() -> None:
    """Relies on ``Histogram``'s ``_sum`` and ``_buckets``, which are not cumulative."""
    one, all_at_once = (
        Histogram("waits", "of a test", buckets=(1.0, 2.0), registry=CollectorRegistry()) for _ in range(2)
    )
    for value in (0.5, 1.0, 1.5, 3.0):
        one.observe(value)
    add_to_histogram(all_at_once, (2, 1, 1), 6.0)

    def samples(histogram: Histogram) -> list[tuple[str, dict[str, str], float]]:
        [family] = histogram.collect()
        return [(s.name, s.labels, s.value) for s in family.samples if not s.name.endswith("_created")]

    assert samples(all_at_once) == samples(one)
