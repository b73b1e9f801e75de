"""Times what crosses the network: q, k, v and the attention output of the step's tokens, never the cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vllm_lamina.planner.devices import Transport
from vllm_lamina.planner.efficiency import Array
from vllm_lamina.planner.models import Model

PARTITIONS = ("head", "request", "sequence")
"""How attention workers share attention: KV heads of every request, whole requests, or stretches of every context."""


@dataclass(frozen=True)
class Wire:
    """The network between one group of model workers and the attention workers.

    Attributes
    ----------
    transport
        Latency and utilisation.
    model_bandwidth, attention_bandwidth
        Bytes/s, one way, of all NICs of one model replica and of all attention workers.
    attention_workers, partition
        A sequence partition sends q to, and gets a partial output from, every worker.
    replicas
        Model replicas that share the attention workers. With several, the hidden state moves to the next replica
        after each layer.
    """

    model: Model
    transport: Transport
    model_bandwidth: float
    attention_bandwidth: float
    attention_workers: int
    partition: str
    replicas: int = 1

    @property
    def rate(self) -> float:
        """Bytes/s, one way, of one batch's large messages."""
        return min(self.model_bandwidth, self.attention_bandwidth) * self.transport.utilisation

    @property
    def _copies(self) -> int:
        return self.attention_workers if self.partition == "sequence" else 1

    @property
    def query_bytes(self) -> float:
        """Bytes of q of one token, all layers; the output is as large."""
        return float(self.model.layers * self.model.query_bytes * self._copies)

    @property
    def residual_bytes(self) -> float:
        """Bytes of hidden state of one token that move between model replicas, all layers."""
        model = self.model
        moved = model.layers * model.hidden * model.bytes_per_element
        return float(moved) if self.replicas > 1 else 0.0

    def query_time(self, tokens: ArrayLike) -> Array:
        """Seconds that q, or the output, of so many tokens takes, all layers."""
        return np.asarray(tokens, dtype=np.float64) * self.query_bytes / self.rate

    def key_value_time(self, tokens: ArrayLike) -> Array:
        """Seconds that k and v take, all layers."""
        return np.asarray(tokens, dtype=np.float64) * self.model.kv_bytes_per_token / self.rate

    def busy_time(self, tokens: ArrayLike) -> Array:
        """Seconds that one batch occupies the busier side's NICs, in the busier direction.

        q, k and v leave the replicas, beside the hidden state, and enter the attention workers.
        """
        sent = self.query_bytes + self.model.kv_bytes_per_token
        replicas = (sent + self.residual_bytes) / (self.replicas * self.model_bandwidth)
        workers = sent / self.attention_bandwidth
        return np.asarray(tokens, dtype=np.float64) * (max(replicas, workers) / self.transport.utilisation)

    def exposed_time(self, tokens: ArrayLike) -> Array:
        """Seconds that one batch waits for the wire if nothing overlaps.

        That is q, k and v, then the output, and a round trip's latency per layer; a hidden state that changes
        replicas travels while attention runs.
        """
        latency = self.model.layers * self.transport.round_trip
        return 2.0 * self.query_time(tokens) + self.key_value_time(tokens) + latency


def minimum_bandwidth(
    model: Model, tokens: ArrayLike, non_attention_time: ArrayLike, attention_time: ArrayLike, slack: float
) -> Array:
    """Least bytes/s that keeps the network's part of a step under a fraction of the rest.

    ``(2 + 2/G) e d B L / (alpha (MTIME(B) + ATIME(B, l)))`` (arXiv 2405.01814, section 3), both directions together.

    Parameters
    ----------
    slack
        alpha, the latency overhead allowed, such as 0.2.
    """
    moved = np.asarray(tokens, dtype=np.float64) * model.wire_bytes_per_token
    rest: Array = np.asarray(non_attention_time, dtype=np.float64) + np.asarray(
        attention_time, dtype=np.float64
    )
    return np.asarray(moved / (slack * rest))
