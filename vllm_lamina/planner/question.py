"""What the user asks the planner, and what it may answer."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_lamina.planner.deployment import Deployment, Lamina
from vllm_lamina.planner.devices import Catalogue, Device
from vllm_lamina.planner.models import Model
from vllm_lamina.planner.pipeline import SteadyState
from vllm_lamina.planner.results import SimulationResult
from vllm_lamina.planner.traces import Trace


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
