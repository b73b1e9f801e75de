"""What the scheduler's process counts, and how it reaches the process that shows it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_lamina.compat.outputs import StepTimes


class LaminaStats(msgspec.Struct, omit_defaults=True):
    """What happened since the last of these was made; only `workers` to `batches` describe the present.

    Differences, because vLLM gives each to one of its API server processes, whose counters are added up.

    Attributes
    ----------
    workers
        Addresses of the attention workers.
    lost
        Those of them that the engine knows to be lost.
    kv_usage
        For each of `workers` the part of its KV blocks that requests hold.
    batches
        Batches with running requests.
    model_seconds
        Time that the model worker computed.
    waits, waited
        As in `StepTimes`.
    """

    workers: list[str] = []
    lost: list[str] = []
    kv_usage: list[float] = []
    batches: int = 0
    steps: int = 0
    model_seconds: float = 0.0
    waits: list[int] = []
    waited: float = 0.0
    recoveries: int = 0
    requests_recomputed: int = 0
    tokens_recomputed: int = 0


@dataclass
class RecoveryCounters:
    """What the loss of attention workers cost. Whoever recovers adds to it, on the scheduler's thread.

    Examples
    --------
    >>> scheduler.engine_metrics.recovery.recoveries += 1
    >>> scheduler.engine_metrics.recovery.tokens_recomputed += request.num_computed_tokens
    """

    recoveries: int = 0
    requests_recomputed: int = 0
    tokens_recomputed: int = 0
    lost_workers: set[str] = field(default_factory=set)
    """Addresses of workers that are lost, and that the engine goes on without."""


class EngineMetrics:
    """Counters of one engine, on its scheduler's thread."""

    def __init__(self) -> None:
        self.recovery = RecoveryCounters()
        self._sent = RecoveryCounters()
        self._steps = 0
        self._model_seconds = self._waited = 0.0
        self._waits: tuple[int, ...] = ()

    def observe(self, times: StepTimes | None) -> None:
        """Count a step; None is one without tokens."""
        if times is None:
            return
        self._steps += 1
        self._model_seconds += max(times.model, 0.0)
        self._waited += times.waited
        waits = self._waits
        self._waits = tuple(map(sum, zip(waits, times.waits, strict=True))) if waits else times.waits

    def take(self, workers: list[str], kv_usage: list[float], batches: int) -> dict[str, Any]:
        """What was counted since it was taken last: a `LaminaStats`, as plain data."""
        stats = LaminaStats(
            workers=workers,
            kv_usage=kv_usage,
            batches=batches,
            steps=self._steps,
            model_seconds=self._model_seconds,
            waits=list(self._waits),
            waited=self._waited,
        )
        self._steps, self._model_seconds, self._waited, self._waits = 0, 0.0, 0.0, ()
        if self.recovery != self._sent:
            self._take_recovery(stats)
        if self.recovery.lost_workers:
            stats.lost = sorted(self.recovery.lost_workers)
        plain: dict[str, Any] = msgspec.to_builtins(stats)
        return plain

    def _take_recovery(self, stats: LaminaStats) -> None:
        now, sent = self.recovery, self._sent
        stats.recoveries = now.recoveries - sent.recoveries
        stats.requests_recomputed = now.requests_recomputed - sent.requests_recomputed
        stats.tokens_recomputed = now.tokens_recomputed - sent.tokens_recomputed
        self._sent = dataclasses.replace(now, lost_workers=set(now.lost_workers))
