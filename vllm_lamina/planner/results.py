"""What a deployment does, in the steady state and in a simulated run: tokens/s, TBT, TTFT, busy fractions."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from vllm_lamina.planner.deployment import Deployment
from vllm_lamina.planner.devices import Array


@dataclass(frozen=True)
class SteadyState:
    """Equal batches in flight for ever.

    Attributes
    ----------
    batch
        Sequences in flight, all batches together.
    tbt
        Time between tokens, seconds.
    model_busy, attention_busy, wire_busy
        Fraction of the time that each is busy; the largest bounds the throughput. On a baseline, attention
        occupies the model workers and the two add up to 1.
    """

    batch: int
    tbt: float
    model_busy: float
    attention_busy: float
    wire_busy: float

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.batch / self.tbt

    @property
    def bottleneck(self) -> str:
        """What to add or speed up for more throughput."""
        busy = {
            "model workers": self.model_busy,
            "attention workers": self.attention_busy,
            "network": self.wire_busy,
        }
        name, share = max(busy.items(), key=lambda item: item[1])
        return name if share > 0.9 else "latency (no stage is saturated)"


def steady_state(deployment: Deployment, batch: int, context: float) -> SteadyState:
    """Time n equal lanes that share `batch` sequences of `context` cached tokens each.

    With per-lane stage times m, a and w, a step takes the longest of: its own stages one after the other,
    n m / replicas, n a, and n w. At t_a = t_m / (n - 1) and a free network that is n m / (n - 1), with every
    device always busy, as in arXiv 2405.01814 v2, section 4.
    """
    lanes = min(deployment.lanes, batch)
    per_lane = -(-batch // lanes)
    per_shard = -(-per_lane // deployment.shards)
    stages = deployment.stages(per_lane)
    model, wire = float(stages.model[per_lane]), float(stages.wire[per_lane])
    # Per-token time is tabled for the sequences that one shard holds.
    attention = float(stages.attention[per_shard]) * per_shard * float(deployment.model.read.tokens(context))
    tbt = max(
        stages.sequential(per_lane, attention),
        lanes * model / deployment.replicas,
        lanes * attention,
        lanes * wire,
    )
    return SteadyState(
        batch=batch,
        tbt=tbt,
        model_busy=lanes * model / deployment.replicas / tbt,
        attention_busy=lanes * attention / tbt,
        wire_busy=lanes * wire / tbt,
    )


@dataclass(frozen=True)
class Percentiles:
    """Seconds: mean, and the values that 50 and 99% of the tokens or requests stay under."""

    mean: float
    p50: float
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
        return Percentiles(0.0, 0.0, 0.0)
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    picked = [float(values[order][np.searchsorted(reached, q * total)]) for q in (0.5, 0.99)]
    return Percentiles(float((values * weights).sum() / total), *picked)
