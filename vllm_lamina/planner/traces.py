"""Request traces: when requests arrive and how long their prompts and answers are, from public files or made up."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.devices import Array, look_up

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
    return _read(path) if path.suffix in _COLUMNS else look_up("trace", name, WORKLOADS).trace(name, seed)


_COLUMNS = {
    ".csv": ("an Azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ".jsonl": ("a Mooncake", "timestamp", "input_length", "output_length"),
}
"""Public formats by suffix: the kind, and the names of arrival, prompt and output."""


def _read(path: Path) -> Trace:
    """Read Azure's CSV (date and time with 100 ns digits) or Mooncake's JSONL (ms; hash_ids are not used)."""
    kind, *columns = _COLUMNS[path.suffix]
    requests: list[tuple[float, int, int]] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = (
                csv.DictReader(file, restval="")
                if path.suffix == ".csv"
                else map(json.loads, filter(str.strip, file))
            )
            for row in rows:
                arrival, prompt, output = (row[column] for column in columns)
                seconds = _seconds(arrival) if path.suffix == ".csv" else float(arrival) / 1e3
                if not math.isfinite(seconds):
                    raise ValueError(f"arrival at {arrival!r}")
                requests.append((seconds, _tokens(prompt), _tokens(output)))
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        reasons: dict[type, str] = {
            json.JSONDecodeError: "not JSON",
            KeyError: f"no {error}",
            TypeError: "not an object of numbers",
        }
        reason = reasons.get(type(error), str(error))
        raise ConfigError(
            f"{path} is not {kind} trace ({', '.join(columns)}): request {len(requests) + 1}: {reason}"
        ) from error
    requests.sort(key=lambda request: request[0])
    arrivals = np.array([request[0] for request in requests])
    lengths = np.array([request[1:] for request in requests], dtype=np.int64).reshape(-1, 2)
    return Trace(path.stem, arrivals - arrivals[:1], lengths[:, 0], lengths[:, 1])


def _seconds(timestamp: str) -> float:
    """Read Azure's date and time; `datetime` does not take the seventh digit of their fraction."""
    head, dot, tail = timestamp.partition(".")
    digits = len(tail) - len(tail.lstrip("0123456789"))
    text = f"{head}{dot}{tail[:digits][:6]:0<6}{tail[digits:]}" if dot else timestamp
    return datetime.fromisoformat(text).timestamp()


def _tokens(count: str | int) -> int:
    """A request of 0 tokens still passes through the engine once."""
    tokens = int(count)
    if not 0 <= tokens == float(count) < 2**31:
        raise ValueError(f"{count!r} tokens")
    return max(1, tokens)
