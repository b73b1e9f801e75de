"""Request traces: when requests arrive and how long their prompts and answers are, from public files or made up."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.catalogue import look_up
from vllm_lamina.planner.efficiency import Array

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order of arrival.

    Attributes
    ----------
    name
        For people.
    arrivals
        Seconds since the first. [requests]
    prompts, outputs
        Tokens, each at least 1. [requests]
    """

    name: str
    arrivals: Array
    prompts: Counts
    outputs: Counts

    def __post_init__(self) -> None:
        if len(self.arrivals) == 0:
            raise ConfigError(f"trace {self.name!r} has no requests")
        if min(self.prompts.min(), self.outputs.min()) < 1:
            raise ConfigError(f"trace {self.name!r} has a request without prompt or without output tokens")

    def __len__(self) -> int:
        return len(self.arrivals)

    @property
    def mean_context(self) -> float:
        """Cached tokens of a running request, averaged over its decode steps: E[p o + o^2 / 2] / E[o]."""
        outputs = self.outputs.astype(np.float64)
        return float((self.prompts * outputs + outputs**2 / 2).sum() / outputs.sum())

    def saturating(self) -> Trace:
        """All requests waiting from the start, as for a throughput measurement."""
        return Trace(self.name, np.zeros(len(self)), self.prompts, self.outputs)

    def at_rate(self, requests_per_second: float, seed: int = 0) -> Trace:
        """The same lengths with Poisson arrivals."""
        gaps = np.random.default_rng(seed).exponential(1.0 / requests_per_second, len(self))
        return Trace(self.name, np.cumsum(gaps), self.prompts, self.outputs)

    def head(self, count: int) -> Trace:
        """The first `count` requests."""
        return Trace(self.name, self.arrivals[:count], self.prompts[:count], self.outputs[:count])

    def fitting(self, tokens: int) -> Trace:
        """Only requests whose prompt and output together are at most `tokens`."""
        keep = self.prompts + self.outputs <= tokens
        return Trace(self.name, self.arrivals[keep], self.prompts[keep], self.outputs[keep])


@dataclass(frozen=True)
class Lengths:
    """A log-normal distribution of token counts.

    Attributes
    ----------
    mean
        Mean of the counts.
    variation
        Coefficient of variation, standard deviation over mean.
    """

    mean: float
    variation: float

    def draw(self, count: int, random: np.random.Generator) -> Counts:
        """Draw counts, at least 1, whose mean is `mean` up to rounding.

        The variance is divided by the drawn mean, not left to chance: heavy tails would otherwise move a trace's
        mean by several percent from seed to seed.
        """
        sigma = math.sqrt(math.log(1.0 + self.variation**2))
        values = random.lognormal(-0.5 * sigma**2, sigma, count)
        values *= self.mean / values.mean()
        counts: Counts = np.maximum(1, np.rint(values)).astype(np.int64)
        return counts


@dataclass(frozen=True)
class Workload:
    """Recipe of a synthetic trace.

    Attributes
    ----------
    requests, prompt, output
        The trace's size and its lengths.
    duration
        Seconds over which requests arrive, as a Poisson process.
    source
        Where means and variation come from.
    """

    requests: int
    prompt: Lengths
    output: Lengths
    duration: float
    source: str

    def trace(self, name: str, seed: int = 0) -> Trace:
        """Draw the trace; the same seed gives the same trace."""
        random = np.random.default_rng(seed)
        arrivals = np.sort(random.uniform(0.0, self.duration, self.requests))
        prompts = self.prompt.draw(self.requests, random)
        return Trace(name, arrivals, prompts, self.output.draw(self.requests, random))


_COUNTED = "means: arXiv 2405.01814 v2, table 4; variation: counted in the public trace"
WORKLOADS = {
    "azure-conv": Workload(19_366, Lengths(1154.7, 0.96), Lengths(211.1, 0.77), 3502, _COUNTED),
    "azure-code": Workload(8_819, Lengths(2047.8, 0.96), Lengths(27.9, 2.15), 3436, _COUNTED),
    "kimi-conv": Workload(12_031, Lengths(12_035.1, 1.31), Lengths(342.6, 0.73), 3537, _COUNTED),
    "kimi-ta": Workload(
        23_608,
        Lengths(8_560.0, 1.3),
        Lengths(182.1, 1.0),
        3537,
        "means: arXiv 2405.01814 v2, table 4; variation and duration: assumed near kimi-conv's",
    ),
}
"""The paper's four traces, as log-normal prompt and output lengths that are independent of each other."""


def load_trace(name: str, seed: int = 0) -> Trace:
    """Return a synthetic trace by name, or read a file: Azure's CSV, or Mooncake's (Kimi's) JSONL.

    Raises
    ------
    ConfigError
        There is no such trace, or the file is not in its format.
    """
    path = Path(name)
    if path.suffix in (".csv", ".jsonl"):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = (
                    list(csv.DictReader(file))
                    if path.suffix == ".csv"
                    else [json.loads(line) for line in file]
                )
        except OSError as error:
            raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON on every line: {error}") from error
        return _azure(path, rows) if path.suffix == ".csv" else _mooncake(path, rows)
    return look_up("trace", name, WORKLOADS).trace(name, seed)


def _azure(path: Path, rows: list[dict[str, Any]]) -> Trace:
    """Azure's LLM inference traces: TIMESTAMP (100 ns digits), ContextTokens, GeneratedTokens."""
    try:
        times = [datetime.fromisoformat(_microseconds(row["TIMESTAMP"])).timestamp() for row in rows]
        return _trace(path, times, *_lengths(rows, "ContextTokens", "GeneratedTokens"))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is not an Azure trace (TIMESTAMP,ContextTokens,GeneratedTokens): {error}"
        ) from error


def _mooncake(path: Path, rows: list[dict[str, Any]]) -> Trace:
    """Mooncake's traces: timestamp (ms), input_length, output_length; hash_ids are not used."""
    try:
        times = [float(row["timestamp"]) / 1e3 for row in rows]
        return _trace(path, times, *_lengths(rows, "input_length", "output_length"))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a Mooncake trace (timestamp, input_length, output_length): {error}"
        ) from error


def _microseconds(timestamp: str) -> str:
    """Cut Azure's seventh digit of the fraction, which `datetime` does not take."""
    head, dot, tail = timestamp.partition(".")
    digits = len(tail) - len(tail.lstrip("0123456789"))
    return f"{head}{dot}{tail[:digits][:6]:0<6}{tail[digits:]}" if dot else timestamp


def _lengths(rows: list[dict[str, Any]], prompt: str, output: str) -> tuple[Counts, Counts]:
    pairs = np.array([(int(row[prompt]), int(row[output])) for row in rows], dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _trace(path: Path, times: list[float], prompts: Counts, outputs: Counts) -> Trace:
    # A request of zero tokens still passes through the engine once.
    order = np.argsort(np.array(times), kind="stable")
    arrivals = np.array(times)[order]
    first = arrivals[0] if len(arrivals) else 0.0
    return Trace(
        path.stem,
        arrivals - first,
        np.maximum(1, prompts[order]),
        np.maximum(1, outputs[order]),
    )
