"""Turns the stages of equal batches into a time between tokens: who is the bottleneck in the steady state."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_lamina.planner.deployment import Deployment


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
    attention = float(stages.attention[per_shard]) * per_shard * context
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
