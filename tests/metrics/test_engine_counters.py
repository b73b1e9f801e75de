"""What the scheduler's process counts: each step and each recovery is sent once."""

from typing import Any

import msgspec

from vllm_lamina.compat.outputs import StepTimes
from vllm_lamina.metrics.engine import EngineMetrics, LaminaStats


def take(metrics: EngineMetrics, **state: Any) -> LaminaStats:
    return msgspec.convert(
        metrics.take(state.get("workers", []), state.get("kv_usage", []), state.get("batches", 0)),
        LaminaStats,
    )


def test_steps_are_added_up_and_sent_once() -> None:
    metrics = EngineMetrics()
    metrics.observe(StepTimes(0.25, 0.1, (1, 0, 2), 0.5))
    metrics.observe(StepTimes(0.5, 0.1, (0, 4, 2), 0.25))
    metrics.observe(None)
    stats = take(metrics, workers=["a:1"], kv_usage=[0.5], batches=2)
    assert (stats.steps, stats.model_seconds, stats.waits, stats.waited) == (2, 0.75, [1, 4, 4], 0.75)
    assert (stats.workers, stats.kv_usage, stats.batches) == (["a:1"], [0.5], 2)
    again = take(metrics)
    assert (again.steps, again.model_seconds, again.waits, again.waited) == (0, 0.0, [], 0.0)


def test_a_clock_that_disagrees_takes_nothing_back() -> None:
    """A counter must not fall; the two parts of a difference are measured by different clocks."""
    metrics = EngineMetrics()
    metrics.observe(StepTimes(-1e-6, 0.0, (), 0.0))
    assert take(metrics).model_seconds == 0.0


def test_recoveries_are_sent_as_differences() -> None:
    metrics = EngineMetrics()
    recovery = metrics.recovery
    recovery.recoveries += 1
    recovery.requests_recomputed += 3
    recovery.tokens_recomputed += 700
    recovery.lost_workers.add("a:1")
    stats = take(metrics)
    assert (stats.recoveries, stats.requests_recomputed, stats.tokens_recomputed) == (1, 3, 700)
    assert stats.lost == ["a:1"]
    recovery.tokens_recomputed += 5
    recovery.lost_workers.clear()
    stats = take(metrics)
    assert (stats.recoveries, stats.requests_recomputed, stats.tokens_recomputed) == (0, 0, 5)
    assert stats.lost == []
