"""Collects what a simulation does and turns it into the figures people compare: tokens/s, TBT, TTFT, busy fractions."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from vllm_lamina.planner.deployment import Deployment
from vllm_lamina.planner.efficiency import Array


@dataclass(frozen=True)
class Percentiles:
    """Seconds: mean, and the values that 50, 90 and 99% of the tokens or requests stay under."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class SimulationResult:
    """What one deployment made of one trace.

    Rates, batch and busy fractions are means over the window from the first arrival to the last admission, so that a
    drained queue at the end does not count; where less than half of the tokens fall into it, over the whole run.

    Attributes
    ----------
    throughput
        Tokens per second.
    mean_batch
        Sequences in flight, all lanes together.
    tbt, ttft
        Time between tokens (per token), time to first token (per request). Seconds.
    model_busy, attention_busy, wire_busy
        Fraction of the time that each is busy, of several workers their mean; on a baseline attention occupies the
        model workers.
    rejected
        Requests too long for the KV cache.
    preemptions
        Times that a running request lost its blocks.
    duration
        Seconds until the last token.
    tokens
        Tokens generated in all.
    model_seconds
        Seconds of work of the model replicas, in all, over the whole run.
    longest_wait
        Longest time between two tokens of one request, seconds.
    """

    throughput: float
    mean_batch: float
    tbt: Percentiles
    ttft: Percentiles
    model_busy: float
    attention_busy: float
    wire_busy: float
    rejected: int
    preemptions: int
    duration: float
    tokens: int
    model_seconds: float
    longest_wait: float

    def tokens_per_dollar(self, dollars_per_hour: float) -> float:
        """Tokens generated for one US dollar."""
        return self.throughput * 3600.0 / dollars_per_hour


class Recorder:
    """The log of a running simulation."""

    def __init__(self, start: float, rejected: int) -> None:
        self.start = self.last_admission = start
        self.rejected = rejected
        self.preemptions = 0
        self.ttft = array("d")
        self._steps = array("d")
        self._gaps = array("d")

    def step(
        self,
        start: float,
        end: float,
        batch: int,
        tokens: int,
        model: float,
        attention: float,
        wire: float,
        late: int,
    ) -> None:
        """Log one step.

        Of its `tokens`, `batch` continue requests that decode, the others are the first after a prefill; `late` of
        the batch did not follow the lane's previous step.
        """
        self._steps.extend((start, end, batch, tokens, model, attention, wire, batch - late))

    def time_between_tokens(self, seconds: float) -> None:
        """Log one token that came after a preemption."""
        self._gaps.append(seconds)

    def result(self, deployment: Deployment) -> SimulationResult:
        """Sum the log up."""
        columns = np.array(self._steps).reshape(-1, 8).T
        starts, ends, batches, tokens, model, attention, wire, regular = columns
        finish = float(ends.max())
        window_end = self.last_admission
        share = np.clip((window_end - starts) / (ends - starts), 0.0, 1.0)
        if (share * tokens).sum() < 0.5 * tokens.sum():
            window_end, share = finish, np.ones_like(starts)
        window = window_end - self.start
        return SimulationResult(
            throughput=float((share * tokens).sum()) / window,
            mean_batch=float((share * batches * (ends - starts)).sum()) / window,
            tbt=_percentiles(
                np.concatenate([ends - starts, np.array(self._gaps)]),
                np.concatenate([regular, np.ones(len(self._gaps))]),
            ),
            ttft=_percentiles(np.array(self.ttft), np.ones(len(self.ttft))),
            model_busy=float((share * model).sum()) / window / deployment.replicas,
            attention_busy=float((share * attention).sum()) / window,
            wire_busy=float((share * wire).sum()) / window,
            rejected=self.rejected,
            preemptions=self.preemptions,
            duration=finish - self.start,
            tokens=round(tokens.sum()),
            model_seconds=float(model.sum()),
            longest_wait=float(max([*self._gaps, (ends - starts)[regular > 0].max(initial=0.0)])),
        )


def _percentiles(values: Array, weights: Array) -> Percentiles:
    total = weights.sum()
    if total <= 0:
        return Percentiles(0.0, 0.0, 0.0, 0.0)
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    picked = [float(values[order][np.searchsorted(reached, q * total)]) for q in (0.5, 0.9, 0.99)]
    return Percentiles(float((values * weights).sum() / total), *picked)
