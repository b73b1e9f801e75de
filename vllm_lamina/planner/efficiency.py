"""Says which fraction of a device's peak an operator reaches at a given batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_lamina.errors import ConfigError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A fraction of peak by batch size: linear in log2(batch) between points, constant outside them.

    Attributes
    ----------
    points
        Pairs (batch, fraction), batches at least 1 and increasing, fractions in (0, 1].
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        batches = [batch for batch, _ in self.points]
        if not batches or batches[0] < 1 or any(a >= b for a, b in pairwise(batches)):
            raise ConfigError(f"batches of an efficiency curve must be at least 1 and increase: {batches}")
        if any(not 0 < fraction <= 1 for _, fraction in self.points):
            raise ConfigError(f"efficiencies must be in (0, 1]: {self.points}")

    @classmethod
    def read(cls, value: float | Sequence[Sequence[float]]) -> Curve:
        """Read a constant, or a list of [batch, fraction]."""
        if isinstance(value, int | float):
            return cls(((1.0, float(value)),))
        return cls(tuple((float(batch), float(fraction)) for batch, fraction in value))

    def at(self, batch: ArrayLike) -> Array:
        """Fraction of peak at each batch size."""
        batches, fractions = zip(*self.points, strict=True)
        interpolated: Array = np.interp(np.log2(np.maximum(batch, 1.0)), np.log2(batches), fractions)
        return interpolated


@dataclass(frozen=True)
class Efficiency:
    """What a device reaches of its peaks, by kind of work, and what its software adds to each step.

    Attributes
    ----------
    weight_mbu
        Memory bandwidth utilisation of reading weights in the non-attention operators.
    gemm_mfu
        Model FLOP/s utilisation of the non-attention operators where compute binds.
    attention_mbu
        Memory bandwidth utilisation of the attention operator.
    attention_mfu
        FLOP/s utilisation of the attention operator where compute binds.
    step_overhead
        Seconds of a step that depend on neither model nor batch (scheduling, sampling).
    layer_overhead
        Seconds that each layer adds whatever its size (launches, framework).
    sequence_overhead
        Seconds that each sequence of the batch adds to a step (input preparation, output handling).
    source
        Where the figures come from.
    """

    weight_mbu: Curve
    gemm_mfu: Curve
    attention_mbu: Curve
    attention_mfu: Curve
    step_overhead: float = 0.0
    layer_overhead: float = 0.0
    sequence_overhead: float = 0.0
    source: str = ""

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Efficiency:
        """Read a TOML table with the attributes' names; overheads end in ``_us`` and are microseconds."""
        try:
            return cls(
                weight_mbu=Curve.read(table["weight_mbu"]),
                gemm_mfu=Curve.read(table["gemm_mfu"]),
                attention_mbu=Curve.read(table["attention_mbu"]),
                attention_mfu=Curve.read(table["attention_mfu"]),
                step_overhead=table.get("step_overhead_us", 0.0) * 1e-6,
                layer_overhead=table.get("layer_overhead_us", 0.0) * 1e-6,
                sequence_overhead=table.get("sequence_overhead_us", 0.0) * 1e-6,
                source=table["source"],
            )
        except KeyError as error:
            raise ConfigError(f"an efficiency table lacks {error}") from error


_PEAK = Curve.read(1.0)
IDEAL = Efficiency(_PEAK, _PEAK, _PEAK, _PEAK, source="the roofline itself")
