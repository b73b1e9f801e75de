"""Fits the cost model's unknowns to measured decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from vllm_lamina.planner.efficiency import Array
from vllm_lamina.planner.models import Model


@dataclass(frozen=True)
class StepSample:
    """One measured step of a model with contexts too short to matter: sequences and seconds."""

    model: Model
    batch: int
    seconds: float


@dataclass(frozen=True)
class StepFit:
    """What explains the samples.

    Attributes
    ----------
    flops, weight_bandwidth
        FLOP/s and bytes/s that the matrix products reach.
    step_overhead, layer_overhead, sequence_overhead
        Seconds per step, per layer, per sequence.
    error
        Median relative error over the samples.
    """

    flops: float
    weight_bandwidth: float
    step_overhead: float
    layer_overhead: float
    sequence_overhead: float
    error: float


def fit_steps(samples: Sequence[StepSample]) -> StepFit:
    """Fit ``t = step + layer L + sequence B + max(2NB / F, (eN + 2eBd) / M)`` by least relative squares.

    F and M are searched on a grid 4% fine between 1 GFLOP/s and 1 PFLOP/s, and 1 GB/s and 10 TB/s; for each pair the
    three overheads, which are not negative, follow by linear least squares.
    """
    seconds = np.array([s.seconds for s in samples])
    flops = np.array([2.0 * s.model.active_params * s.batch for s in samples])
    moved = np.array(
        [
            float(s.model.streamed_bytes(s.batch))
            + 2.0 * s.model.bytes_per_element * s.batch * s.model.hidden
            for s in samples
        ]
    )
    columns = np.array([[1.0, s.model.layers, s.batch] for s in samples])
    weighted = columns / seconds[:, None]

    def solve(rate: float, bandwidth: float) -> tuple[float, Array, Array]:
        matrix = np.maximum(flops / rate, moved / bandwidth)
        overheads = _non_negative(weighted, 1.0 - matrix / seconds)
        residual = (matrix + columns @ overheads) / seconds - 1.0
        return float((residual**2).sum()), overheads, residual

    best: tuple[float, float, float] | None = None
    for ratio in (1.5, 1.2, 1.04):
        rates, bandwidths = (
            (np.geomspace(1e9, 1e15, 35), np.geomspace(1e9, 1e13, 24))
            if best is None
            else (best[1] * ratio ** np.arange(-3.0, 4.0), best[2] * ratio ** np.arange(-3.0, 4.0))
        )
        for rate in rates:
            for bandwidth in bandwidths:
                loss = solve(rate, bandwidth)[0]
                if best is None or loss < best[0]:
                    best = (loss, float(rate), float(bandwidth))
    assert best is not None
    _, overheads, residual = solve(best[1], best[2])
    step, layer, sequence = overheads.tolist()
    return StepFit(best[1], best[2], step, layer, sequence, float(np.median(np.abs(residual))))


def _non_negative(matrix: Array, target: Array) -> Array:
    """Least squares with coefficients of at least 0, by trying which are 0 (there are three)."""
    count = matrix.shape[1]
    best, best_loss = np.zeros(count), float((target**2).sum())
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            columns = list(chosen)
            values = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            if (values < 0).any():
                continue
            loss = float(((matrix[:, columns] @ values - target) ** 2).sum())
            if loss < best_loss:
                best, best_loss = np.zeros(count), loss
                best[columns] = values
    return best
