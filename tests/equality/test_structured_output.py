"""Structured output: requests with and without a grammar, in both lanes at once, give what they give in stock vLLM."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from comparison import assert_same_phase, assert_same_until_aborted
from engines import Engines
from jobs import Job, JobResult, Phase, Request
from models import ModelZoo
from workloads import greedy, prompt, sampled

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["lane", "lamina"]},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    },
    "required": ["name", "size", "kind", "parts"],
    "additionalProperties": False,
}
PATTERN = r"[0-9]{1,4}(\.[0-9]{2})? (EUR|USD)"
CHOICES = ["attention", "model", "a staggered batch"]
GRAMMAR = """
root ::= term (" + " term)*
term ::= [a-c] | "(" root ")"
"""

ENGINE = {
    "max_num_batched_tokens": 64,
    # White space between the parts of JSON may go on for ever.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}

# One request of each kind; None is a request without a grammar.
KINDS: list[dict[str, Any] | None] = [
    {"json": SCHEMA},
    {"regex": PATTERN},
    None,
    {"choice": CHOICES},
    {"grammar": GRAMMAR},
    {"json_object": True},
    None,
]


def structured(kind: dict[str, Any] | None, seed: int | None = None) -> dict[str, Any]:
    max_tokens = 48 if kind is None else 120
    params = greedy(max_tokens) if seed is None else sampled(max_tokens, seed)
    return params if kind is None else params | {"structured_outputs": kind, "ignore_eos": False}


# Prompts of words alone: vLLM's text of an output begins with what of the prompt was no whole character.
TOGETHER = Phase(
    "together",
    [Request(list(range(400 + i, 420 + 4 * i)), structured(kind)) for i, kind in enumerate(KINDS)],
)
# Short prompts: vLLM 0.32 fails on CPU where a seeded request's prompt is cut into chunks.
SAMPLED = Phase(
    "sampled", [Request(prompt(8, seed=10 + i), structured(kind, seed=i)) for i, kind in enumerate(KINDS)]
)
# Prompts of several chunks join while others decode.
ARRIVALS = Phase(
    "arrivals",
    [
        Request(prompt(61 * i % 290 + 1, seed=20 + i), structured(kind), after_step=2 * i)
        for i, kind in enumerate(KINDS + KINDS)
    ],
)
ABORTED = {0: 4, 1: 1, 2: 6, 5: 9}
ABORTS = Phase(
    "aborts",
    [
        Request(prompt(90 + i, seed=50 + i), structured(kind), after_step=i, abort_after=ABORTED.get(i))
        for i, kind in enumerate(KINDS)
    ],
)
AFTER_ABORTS = Phase(
    "after aborts",
    [Request(prompt(130, seed=70 + i), structured(kind)) for i, kind in enumerate(KINDS[::-1])],
)


@pytest.fixture(scope="module")
def results(engines: Engines, model_zoo: ModelZoo) -> tuple[JobResult, JobResult]:
    phases = [TOGETHER, SAMPLED, ARRIVALS, ABORTS, AFTER_ABORTS]
    return engines.pair(Job(model_zoo("llama"), phases, ENGINE))


@pytest.mark.parametrize("phase", [TOGETHER, SAMPLED, ARRIVALS, AFTER_ABORTS], ids=lambda phase: phase.name)
def test_phase(results: tuple[JobResult, JobResult], phase: Phase) -> None:
    stock, lamina = results
    assert_same_phase(stock.phase(phase.name), lamina.phase(phase.name))


def test_aborts(results: tuple[JobResult, JobResult]) -> None:
    stock, lamina = (result.phase(ABORTS.name) for result in results)
    for theirs, ours in zip(stock.requests, lamina.requests, strict=True):
        assert_same_until_aborted(theirs.completions[0], ours.completions[0])


def test_the_output_has_the_structure(results: tuple[JobResult, JobResult]) -> None:
    """Equality alone would hold if no grammar were applied."""
    _, lamina = results
    texts = [request.completions[0].text for request in lamina.phase(TOGETHER.name).requests]
    value = json.loads(texts[0])
    assert value.keys() == SCHEMA["properties"].keys()
    assert value["kind"] in ("lane", "lamina")
    assert re.fullmatch(PATTERN, texts[1])
    assert texts[3] in CHOICES
    assert set(texts[4]) <= set("abc()+ ")
    assert texts[5].startswith("{")
