"""Shows Lamina's metrics in the process that serves ``/metrics``: those of the engine with vLLM's statistics of each
step, those of the attention workers as they answer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_lamina._native import WAIT_BOUNDS
from vllm_lamina.compat.stat_loggers import add_to_histogram, detach_stats, is_first_front_end
from vllm_lamina.config import LaminaConfig
from vllm_lamina.metrics.definitions import METRICS, PREFIX, STATES, WORKER, Metric
from vllm_lamina.metrics.engine import LaminaStats
from vllm_lamina.metrics.polling import WorkerPoll
from vllm_lamina.wire.messages import WorkerStats

ENGINE_LABELS = ("model_name", "engine")
RECOVERY_COUNTERS = ("recoveries", "requests_recomputed", "tokens_recomputed")


class LaminaStatLogger(AggregateStatLoggerBase):
    """One more of vLLM's stat loggers; registers all metrics when it is made."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: Sequence[int]) -> None:
        options = LaminaConfig.from_additional_config(vllm_config.additional_config)
        model_name = vllm_config.model_config.served_model_name
        metrics = {metric.name: register(metric) for metric in METRICS}
        polls = is_first_front_end(vllm_config)  # the others' counters would be added to the same again
        self._engines = {
            index: EngineRecorder(metrics, (model_name, str(index)), options.secret_file, polls)
            for index in engine_indexes
        }
        for engine in self._engines.values():
            engine.use(options.worker_addresses)
            weakref.finalize(self, engine.stop)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Take Lamina's statistics out of vLLM's, and count them."""
        stats = detach_stats(scheduler_stats)
        if stats is not None:
            self._engines[engine_idx].record(msgspec.convert(stats, LaminaStats))

    def log_engine_initialized(self) -> None:
        """Nothing is known of the engine yet."""


def register(metric: Metric) -> Any:
    """Create a metric in the registry of this process."""
    name, labels = PREFIX + metric.name, (*ENGINE_LABELS, *metric.labels)
    match metric.kind:
        case "gauge":
            # Of several API server processes the one that was told last knows best.
            return Gauge(name, metric.meaning, labels, multiprocess_mode="mostrecent")
        case "counter":
            return Counter(name, metric.meaning, labels)
        case "histogram":
            return Histogram(name, metric.meaning, labels, buckets=WAIT_BOUNDS)


class EngineRecorder:
    """The metrics of one engine."""

    def __init__(
        self, metrics: dict[str, Any], labels: tuple[str, str], secret_file: str, polls: bool
    ) -> None:
        self._metrics, self._labels = metrics, labels
        self._secret_file, self._polls = secret_file, polls
        self._engine = {m.name: metrics[m.name].labels(*labels) for m in METRICS if not m.labels}
        self._workers: dict[str, WorkerRecorder] = {}

    def use(self, addresses: Sequence[str]) -> None:
        """Show these workers from now on."""
        before = self._workers
        self._workers = {
            address: before.get(address) or WorkerRecorder(self._metrics, self._labels, address)
            for address in addresses
        }
        for address, worker in before.items():
            if address not in self._workers:
                worker.stop()
        if self._polls:
            for worker in self._workers.values():
                worker.poll(self._secret_file, self._count_up)
        self._engine["workers"].set(len(self._workers))

    def stop(self) -> None:
        """End the threads; what is shown remains."""
        for worker in self._workers.values():
            worker.stop()

    def record(self, stats: LaminaStats) -> None:
        """Add what the scheduler counted."""
        if stats.workers != list(self._workers):
            self.use(stats.workers)
        engine = self._engine
        engine["batches_in_flight"].set(stats.batches)
        engine["steps"].inc(stats.steps)
        engine["model_worker_busy_seconds"].inc(stats.model_seconds)
        if stats.waits:
            add_to_histogram(engine["exchange_wait_seconds"], stats.waits, stats.waited)
        for name in RECOVERY_COUNTERS:
            if gained := getattr(stats, name):
                engine[name].inc(gained)
        for address, usage in zip(stats.workers, stats.kv_usage, strict=True):
            self._workers[address].record_engine(usage, address in stats.lost)

    def _count_up(self) -> None:
        self._engine["workers_up"].set(sum(worker.up for worker in self._workers.values()))


class WorkerRecorder:
    """The metrics of one attention worker, and the thread that polls it. The engine and that thread may use it."""

    COUNTERS = (
        ("worker_rejected_frames", "rejected_frames"),
        ("worker_refused_clients", "refused_clients"),
        ("worker_received_bytes", "bytes_in"),
        ("worker_sent_bytes", "bytes_out"),
        ("worker_steps", "steps"),
        ("worker_tokens_appended", "tokens_appended"),
    )

    def __init__(self, metrics: dict[str, Any], labels: tuple[str, str], address: str) -> None:
        self._address = address
        self.metrics = {
            m.name: metrics[m.name].labels(*labels, address) for m in METRICS if m.labels == WORKER
        }
        self._seconds = {state: metrics["worker_seconds"].labels(*labels, address, state) for state in STATES}
        self._seen = WorkerStats(connected=False, pool_bytes=0)
        self._answers = self._lost = self._stopped = False
        self._poll: WorkerPoll | None = None
        self._lock = threading.Lock()  # so that the last word on `worker_up` is that of `stop`

    @property
    def up(self) -> bool:
        """Whether it answers and serves an engine, and ours has not given it up."""
        return self._answers and not self._lost and not self._stopped

    def poll(self, secret_file: str, on_answer: Callable[[], None]) -> None:
        """Ask it for its counters from now on."""

        def record(stats: WorkerStats | None) -> None:
            self.record_answer(stats)
            self._show_up()
            on_answer()

        if self._poll is None:
            self._poll = WorkerPoll(self._address, secret_file, record)

    def stop(self) -> None:
        """Ask no more; it is not the engine's."""
        if self._poll is not None:
            self._poll.stop()
            self._stopped = True
            self._show_up()

    def record_engine(self, kv_usage: float, lost: bool) -> None:
        """Show what the engine knows of it."""
        self.metrics["worker_kv_cache_usage_perc"].set(kv_usage)
        self._lost = lost

    def _show_up(self) -> None:
        with self._lock:
            self.metrics["worker_up"].set(self.up)

    def record_answer(self, stats: WorkerStats | None) -> None:
        """Count what it answered; None if it did not."""
        self._answers = stats is not None and stats.connected
        if stats is None:
            self.metrics["worker_heartbeat_misses"].inc()
        if stats is None or not stats.connected:
            return
        for name, counter in self.COUNTERS:
            self.metrics[name].inc(self._gained(stats, counter))
        for state, seconds in self._seconds.items():
            seconds.inc(self._gained(stats, f"ns_{state}") / 1e9)
        self.metrics["worker_kv_cache_bytes"].set(stats.used_bytes)
        self._seen = stats

    def _gained(self, stats: WorkerStats, counter: str) -> int:
        """What a counter gained since the last answer; the worker begins at zero with each engine that connects."""
        now: int = getattr(stats, counter)
        before: int = getattr(self._seen, counter)
        return now - before if now >= before else now
