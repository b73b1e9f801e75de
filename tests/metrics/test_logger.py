"""Counters of attention workers that come, begin at zero again, and are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from vllm_lamina.metrics.definitions import METRICS
from vllm_lamina.metrics.engine import LaminaStats
from vllm_lamina.metrics.logger import EngineRecorder, WorkerRecorder, register
from vllm_lamina.wire.messages import WorkerStats

LABELS = ("model", "0")


@pytest.fixture
def metrics() -> Iterator[dict[str, Any]]:
    yield {metric.name: register(metric) for metric in METRICS}
    unregister_vllm_metrics()


def shown(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(
        f"vllm:lamina_{name}", {"model_name": LABELS[0], "engine": LABELS[1], **labels}
    )


def test_a_counter_does_not_fall_when_the_worker_begins_anew(metrics: dict[str, Any]) -> None:
    worker = WorkerRecorder(metrics, LABELS, "a:1")

    def answer(steps: int, ns_idle: int, connected: bool = True) -> None:
        worker.record_answer(WorkerStats(connected, pool_bytes=1 << 20, steps=steps, ns_idle=ns_idle))

    answer(steps=100, ns_idle=2_000_000_000)
    answer(steps=150, ns_idle=3_000_000_000)
    assert worker.up
    assert shown("worker_steps_total", worker="a:1") == 150
    worker.record_answer(None)
    assert not worker.up
    assert shown("worker_heartbeat_misses_total", worker="a:1") == 1
    answer(steps=0, ns_idle=0, connected=False)
    assert not worker.up
    assert shown("worker_steps_total", worker="a:1") == 150
    answer(steps=20, ns_idle=500_000_000)
    assert worker.up
    assert shown("worker_steps_total", worker="a:1") == 170
    assert shown("worker_seconds_total", worker="a:1", state="idle") == pytest.approx(3.5)


def test_a_worker_that_the_engine_lost_is_not_up_though_it_answers(metrics: dict[str, Any]) -> None:
    worker = WorkerRecorder(metrics, LABELS, "a:1")
    worker.record_answer(WorkerStats(connected=True, pool_bytes=1 << 20))
    worker.record_engine(kv_usage=0.25, lost=True)
    assert not worker.up
    worker.record_engine(kv_usage=0.25, lost=False)
    assert worker.up


def test_workers_are_replaced(metrics: dict[str, Any]) -> None:
    engine = EngineRecorder(metrics, LABELS, secret_file="", polls=False)
    engine.record(LaminaStats(workers=["a:1", "b:1"], kv_usage=[0.5, 0.25]))
    assert shown("workers") == 2
    assert shown("worker_kv_cache_usage_perc", worker="b:1") == 0.25
    engine.record(LaminaStats(workers=["a:1", "c:1"], kv_usage=[0.5, 0.75], recoveries=1))
    assert shown("workers") == 2
    assert shown("worker_kv_cache_usage_perc", worker="c:1") == 0.75
    assert shown("recoveries_total") == 1


def test_statistics_of_a_step_are_counted(metrics: dict[str, Any]) -> None:
    engine = EngineRecorder(metrics, LABELS, secret_file="", polls=False)
    waits = [0] * 16
    waits[1], waits[15] = 2, 1
    step = LaminaStats(steps=3, batches=2, model_seconds=0.5, waits=waits, waited=11.0)
    for _ in range(2):
        engine.record(msgspec.convert(msgspec.to_builtins(step), LaminaStats))
    assert shown("steps_total") == 6
    assert shown("batches_in_flight") == 2
    assert shown("model_worker_busy_seconds_total") == 1.0
    assert shown("exchange_wait_seconds_count") == 6
    assert shown("exchange_wait_seconds_bucket", le="2.5e-05") == 4
    assert shown("exchange_wait_seconds_sum") == 22.0
