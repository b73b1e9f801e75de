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
        Bytes/s, one way, of all NICs of each side; the smaller binds.
    attention_workers, partition
        A sequence partition sends q to, and gets a partial output from, every worker.
    carries_residual
        Whether the hidden state moves to another model replica after each layer (rotation over several replicas).
    """

    model: Model
    transport: Transport
    model_bandwidth: float
    attention_bandwidth: float
    attention_workers: int
    partition: str
    carries_residual: bool = False

    @property
    def rate(self) -> float:
        """Bytes/s that large messages reach, one way."""
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
        return float(model.layers * model.hidden * model.bytes_per_element) if self.carries_residual else 0.0

    def query_time(self, tokens: ArrayLike) -> Array:
        """Seconds that q, or the output, of so many tokens takes, all layers."""
        return np.asarray(tokens, dtype=np.float64) * self.query_bytes / self.rate

    def key_value_time(self, tokens: ArrayLike) -> Array:
        """Seconds that k and v take, all layers."""
        return np.asarray(tokens, dtype=np.float64) * self.model.kv_bytes_per_token / self.rate

    def busy_time(self, tokens: ArrayLike) -> Array:
        """Seconds of the busier direction: q, k, v (and the hidden state) one way, the output the other."""
        residual = (
            np.asarray(tokens, dtype=np.float64)
            * self.residual_bytes
            / (self.model_bandwidth * self.transport.utilisation)
        )
        return self.query_time(tokens) + self.key_value_time(tokens) + residual

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
