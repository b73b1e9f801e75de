"""What an engine is asked to do in a test, and what came out of it: plain data that crosses processes as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Self

import runners


@dataclass(frozen=True)
class Request:
    """One request of a phase.

    `params` are the fields of vLLM's SamplingParams, with those of `structured_outputs` in their place. The request
    arrives once `after_step` engine steps of its phase are done. It is aborted `abort_delay` engine steps after it has
    `abort_after` output tokens: at once its lane is idle, a step later it is in flight. `adapter` is the directory of
    its LoRA adapter. With `more` it is a session, whose further inputs these are: it gives its output tokens after
    each, and waits between them. `media` are the random inputs of each kind, such as images, whose marks are in the
    prompt: the shape of each, and the number that it is random by.
    """

    prompt: list[int]
    params: dict[str, Any]
    after_step: int = 0
    abort_after: int | None = None
    abort_delay: int = 0
    adapter: str | None = None
    more: tuple[list[int], ...] = ()
    media: dict[str, list[tuple[list[int], int]]] = field(default_factory=dict)


RESET = "reset_prefix_cache"
"""A method of the engine, which must succeed."""


@dataclass(frozen=True)
class Call:
    """A call of a method of the model workers, of `apply_model` with a function `module:name`, or `RESET`.

    It is made once the first request of its phase has so many output tokens; at the end of the phase if it never has.
    """

    method: str
    arguments: dict[str, Any]
    after_tokens: int


@dataclass(frozen=True)
class Phase:
    """Requests that run together. The next phase begins when all are done, with the prefix cache as they left it."""

    name: str
    requests: list[Request]
    calls: list[Call] = field(default_factory=list)
    """In the order in which they are made."""


@dataclass(frozen=True)
class Job:
    """All that one engine does in its life.

    `engine` are the keyword arguments of vLLM's LLM; `executor` is None for stock vLLM; `kv_memory_mib` is the size of
    the KV pool, wherever it is; `worker_memory_mib` are those of attention workers that run already, where Lamina is to
    use these instead; `environment` are variables of its process, and `runner` is vLLM's model runner. With
    `random_lanes`, a seed, the number of lanes changes at random, and each step is checked (`adversary.py`).
    With `streams`, layers are exchanged as on a GPU (`cpu_stream.py`), with `graphs` too in steps that are captured
    (`cpu_graph.py`). Equal jobs give equal results, which is what makes them cacheable.
    """

    model: str
    phases: list[Phase]
    engine: dict[str, Any] = field(default_factory=dict)
    executor: str | None = None
    kv_memory_mib: int = 256
    worker_memory_mib: tuple[int, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    runner: str = runners.DEFAULT
    random_lanes: int | None = None
    streams: bool = False
    graphs: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        data = json.loads(text)
        phases = [
            Phase(
                phase["name"],
                [Request(**request) for request in phase["requests"]],
                [Call(**call) for call in phase["calls"]],
            )
            for phase in data.pop("phases")
        ]
        return cls(phases=phases, **data)


@dataclass(frozen=True)
class Completion:
    """One sequence. `logprobs` holds, for each output token, those of the likeliest tokens and of the one chosen."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class RequestResult:
    completions: list[Completion]
    prompt_logprobs: list[dict[int, float]]


@dataclass(frozen=True)
class PhaseResult:
    """Results in the order of the phase's requests, and what the engine's counters gained in the phase.

    `tokens_at_calls` says for each call how many output tokens each request had.
    """

    name: str
    requests: list[RequestResult]
    preemptions: int
    prefix_cache_hits: int
    tokens_at_calls: list[list[int]]


@dataclass(frozen=True)
class JobResult:
    """The phases' results, the name of the class of the executor that ran them, and what `adversary.py` counted."""

    executor: str
    phases: list[PhaseResult]
    counts: dict[str, int] = field(default_factory=dict)

    def phase(self, name: str) -> PhaseResult:
        return next(phase for phase in self.phases if phase.name == name)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        data = json.loads(text)
        return cls(data["executor"], [_phase_result(phase) for phase in data["phases"]], data["counts"])


def _phase_result(data: dict[str, Any]) -> PhaseResult:
    requests = [
        RequestResult(
            completions=[
                Completion(**(completion | {"logprobs": _int_keys(completion["logprobs"])}))
                for completion in request["completions"]
            ],
            prompt_logprobs=_int_keys(request["prompt_logprobs"]),
        )
        for request in data["requests"]
    ]
    return PhaseResult(**(data | {"requests": requests}))


def _int_keys(positions: list[dict[str, float]]) -> list[dict[int, float]]:
    """JSON's keys are strings; token ids are not."""
    return [{int(token): value for token, value in position.items()} for position in positions]
