"""Answers a question: enumerates what could be rented, estimates each by its steady state, simulates the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.deployment import Deployment, Lamina, baseline, lamina
from vllm_lamina.planner.devices import Catalogue, Device
from vllm_lamina.planner.models import Model
from vllm_lamina.planner.results import SimulationResult, SteadyState, steady_state
from vllm_lamina.planner.simulator import WATERMARK, EngineOptions, simulate
from vllm_lamina.planner.traces import Trace

TENSOR_PARALLEL = (1, 2, 4, 8, 16)
ATTENTION_WORKERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
BATCHES_IN_FLIGHT = (1, 2, 3, 4)
_GENERATIONS = 6
REJECTED_AT_MOST = 0.01
"""Share of a trace's requests that a deployment may be too small for and still be offered."""
LOAD = 0.9
"""Share of its saturated throughput that an engine is given when a rate is to be served."""


@dataclass(frozen=True)
class Question:
    """What the user asks.

    Attributes
    ----------
    model, trace, devices, catalogue
        What to serve, for whom, on what.
    transport
        Name of the network between model and attention workers.
    price_set
        ``latest`` or ``paper``.
    budget
        US dollars per hour at most, or None.
    tbt_slo
        Seconds that 99% of the times between tokens stay under, or None.
    rate
        Requests per second to be served, or None: then deployments are compared saturated.
    prefill
        Whether prompts are computed on the same devices.
    requests
        Requests of the trace to simulate, unless batches are so large that a simulation needs more to settle.
    max_model_workers, max_attention_workers
        Devices of one engine at most.
    """

    model: Model
    trace: Trace
    devices: tuple[Device, ...]
    catalogue: Catalogue
    transport: str = "nccl"
    price_set: str = "latest"
    budget: float | None = None
    tbt_slo: float | None = None
    rate: float | None = None
    prefill: bool = False
    requests: int = 3000
    max_model_workers: int = 8
    max_attention_workers: int = 16


@dataclass(frozen=True)
class Candidate:
    """One engine that could be rented.

    Attributes
    ----------
    deployment, cost
        What, and its US dollars per hour.
    copies
        Engines that the rate takes, or that the budget pays for; 1 without either.
    max_sequences
        Sequences in flight that memory and the TBT objective allow.
    estimate
        Steady state with that batch.
    result
        Simulation of one saturated engine, for the best candidates only.
    loaded
        Simulation of one engine at its share of the question's rate.
    """

    deployment: Deployment
    cost: float
    copies: int
    max_sequences: int
    estimate: SteadyState
    result: SimulationResult | None = None
    loaded: SimulationResult | None = None

    @property
    def served(self) -> SimulationResult:
        """What its users see: the simulation at the question's rate, else the saturated one."""
        result = self.loaded or self.result
        assert result is not None, "only simulated candidates are in an answer"
        return result

    @property
    def throughput(self) -> float:
        """Tokens per second that all copies can generate: simulated if it was, else estimated."""
        return self.copies * (self.result.throughput if self.result else self.estimate.throughput)

    @property
    def total_cost(self) -> float:
        """US dollars per hour of all copies."""
        return self.cost * self.copies

    @property
    def tokens_per_dollar(self) -> float:
        """Tokens that one US dollar can generate."""
        return self.throughput * 3600.0 / self.total_cost

    @property
    def is_lamina(self) -> bool:
        """Whether attention is on devices of its own."""
        return isinstance(self.deployment, Lamina)


@dataclass(frozen=True)
class Answer:
    """Candidates of each kind, best first, and how many deployments were looked at.

    Attributes
    ----------
    reasons
        Why deployments were left out, each with their number.
    """

    question: Question
    baselines: tuple[Candidate, ...]
    laminas: tuple[Candidate, ...]
    considered: int
    reasons: dict[str, int]

    def score(self, candidate: Candidate) -> float:
        """What candidates are ranked by, see `metric`."""
        if self.question.rate:
            return self.question.rate * 3600.0 / candidate.total_cost
        return candidate.throughput if self.question.budget else candidate.tokens_per_dollar

    @property
    def metric(self) -> str:
        """What "best" means."""
        if self.question.rate:
            return "requests per dollar at this rate"
        return "tokens per second within the budget" if self.question.budget else "tokens per dollar"

    @property
    def ranked(self) -> list[Candidate]:
        """Both kinds together, best first."""
        return sorted([*self.baselines, *self.laminas], key=self.score, reverse=True)

    def gain(self, candidate: Candidate) -> float | None:
        """Score relative to the best baseline; None if no baseline is possible."""
        return self.score(candidate) / self.score(self.baselines[0]) if self.baselines else None


Progress = Callable[[list[Candidate]], Iterable[Candidate]]


def answer(question: Question, finalists: int = 6, progress: Progress = iter) -> Answer:
    """Find the best deployments of each kind.

    Parameters
    ----------
    finalists
        How many of each kind to simulate.
    progress
        Wraps the iteration over the simulations, for a progress bar.

    Raises
    ------
    ConfigError
        Nothing that the question allows can serve the model; the message says what stands in the way.
    """
    reasons: dict[str, int] = {}
    candidates: list[Candidate] = []
    considered = 0
    for make in _makers(question):
        considered += 1
        try:
            candidates.append(_candidate(question, make()))
        except ConfigError as error:
            reasons[str(error)] = reasons.get(str(error), 0) + 1
    if not candidates:
        worst = sorted(reasons.items(), key=lambda item: -item[1])[:3]
        raise ConfigError(
            f"none of {considered} deployments of {question.model.name} works: "
            + "; ".join(f"{reason} ({count} of them)" for reason, count in worst)
        )
    everything = Answer(question, (), (), considered, reasons)
    best_first = sorted(candidates, key=everything.score, reverse=True)
    chosen = _finalists(best_first, finalists)
    simulated = []
    for candidate in progress(chosen):
        served = _simulated(question, candidate)
        if served is not None:
            simulated.append(served)
    if not simulated:
        raise ConfigError(_nothing_serves(question))
    simulated.sort(key=everything.score, reverse=True)
    return replace(
        everything,
        baselines=tuple(c for c in simulated if not c.is_lamina),
        laminas=tuple(c for c in simulated if c.is_lamina),
    )


def _nothing_serves(question: Question) -> str:
    limits = []
    if question.tbt_slo:
        limits.append(f"keeps 99% of the times between tokens under {_ms(question.tbt_slo)}")
    if question.rate and question.budget:
        limits.append(f"serves {question.rate:g} requests per second for {question.budget:.2f} USD per hour")
    return f"no deployment {' and '.join(limits)} on this trace; allow more, or other devices"


def _finalists(best_first: list[Candidate], count: int) -> list[Candidate]:
    """The best `count` of each kind, and the best baseline of every device."""
    laminas = [c for c in best_first if c.is_lamina][:count]
    baselines = [c for c in best_first if not c.is_lamina]
    seen: set[str] = set()
    chosen = []
    for rank, candidate in enumerate(baselines):
        device = candidate.deployment.compute.device.key
        if rank < count or device not in seen:
            chosen.append(candidate)
        seen.add(device)
    return chosen + laminas


def _makers(question: Question) -> Iterator[Callable[[], Deployment]]:
    """Yield a constructor of each deployment to look at; constructing may fail."""
    model, catalogue = question.model, question.catalogue
    sizes = [size for size in TENSOR_PARALLEL if size <= question.max_model_workers]
    workers = [count for count in ATTENTION_WORKERS if count <= question.max_attention_workers]
    for device, size in product(question.devices, sizes):
        yield partial(baseline, model, device, size, catalogue)
    for compute, memory in product(question.devices, repeat=2):
        for size, lanes, count in product(sizes, BATCHES_IN_FLIGHT, workers):
            model_workers = size * max(1, lanes - 1)
            if model_workers <= question.max_model_workers:
                yield partial(
                    lamina,
                    model,
                    compute,
                    memory,
                    (model_workers, count),
                    catalogue,
                    transport=question.transport,
                    lanes=lanes,
                    # Heads balance the load; where they do not divide, whole requests go to workers.
                    partition="head" if model.heads_divide_by(count) else "request",
                )


def _candidate(question: Question, deployment: Deployment) -> Candidate:
    cost = deployment.cost(question.price_set)
    copies = 1
    if question.budget is not None and question.rate is None:
        copies = int(question.budget // cost)
        if copies < 1:
            raise ConfigError(f"it costs more than the budget of {question.budget:.2f} USD per hour")
    trace = question.trace
    room = deployment.shard_tokens * (1.0 - WATERMARK)
    kept = deployment.model.kept
    too_long = float((kept.tokens(trace.prompts + trace.outputs) > room).mean())
    if too_long > REJECTED_AT_MOST:
        raise ConfigError(f"its KV cache is too small for more than {REJECTED_AT_MOST:.0%} of the requests")
    batch = max(
        1, min(len(trace), int(deployment.shards * room / float(kept.tokens(trace.mean_context + 8.0))))
    )
    batch = _within_slo(deployment, batch, trace.mean_context, question.tbt_slo)
    estimate = steady_state(deployment, batch, trace.mean_context)
    if question.rate is not None:
        copies = _copies(question.rate, trace, estimate.throughput)
    return Candidate(deployment, cost, copies, batch, estimate)


def _copies(rate: float, trace: Trace, throughput: float) -> int:
    """Engines of so many tokens per second that a rate in requests per second takes."""
    return math.ceil(rate * float(trace.outputs.mean()) / (LOAD * throughput))


def _within_slo(deployment: Deployment, batch: int, context: float, slo: float | None) -> int:
    """The largest batch, up to `batch`, whose steady TBT meets the objective."""
    if slo is None or steady_state(deployment, batch, context).tbt <= slo:
        return batch
    low, high = 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        if steady_state(deployment, middle, context).tbt <= slo:
            low = middle
        else:
            high = middle
    if low == 0:
        raise ConfigError(f"its time between tokens is above {_ms(slo)} even for one request")
    return low


def _simulated(question: Question, candidate: Candidate) -> Candidate | None:
    """Run the trace; with an objective, shrink the batch until 99% of the times between tokens meet it."""
    slo = question.tbt_slo
    trace = question.trace.head(max(question.requests, _GENERATIONS * candidate.max_sequences))
    limit = candidate.max_sequences if slo else None
    for _ in range(6):
        options = EngineOptions(prefill=question.prefill, max_sequences=limit)
        result = simulate(candidate.deployment, trace, options)
        if slo is None or limit is None or result.tbt.p99 <= slo:
            estimate = steady_state(
                candidate.deployment, max(1, round(result.mean_batch)), question.trace.mean_context
            )
            served = replace(
                candidate,
                result=result,
                estimate=estimate,
                # Without an objective memory is the limit, and the engine's must not come before it.
                max_sequences=limit or max(candidate.max_sequences, math.ceil(1.25 * result.mean_batch)),
            )
            return _at_rate(question, served, options) if question.rate else served
        limit = int(limit * min(0.95, slo / result.tbt.p99))
        if limit < 1:
            return None
    return None


def _at_rate(question: Question, candidate: Candidate, options: EngineOptions) -> Candidate | None:
    """Take as many engines as the rate needs and simulate one; None if the budget does not pay for them."""
    assert candidate.result is not None
    assert question.rate is not None
    trace = question.trace
    copies = _copies(question.rate, trace, candidate.result.throughput)
    candidate = replace(candidate, copies=copies)
    if question.budget is not None and candidate.total_cost > question.budget:
        return None
    # Each engine sees its share as a Poisson process, long enough for several of its batches to come and go.
    count = max(question.requests, _GENERATIONS * candidate.max_sequences)
    arriving = trace.head(count).at_rate(question.rate / copies)
    return replace(candidate, loaded=simulate(candidate.deployment, arriving, options))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:g} ms"
