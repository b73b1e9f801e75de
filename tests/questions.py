"""Prompts for servers, each with the tokens that undisturbed stock vLLM answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from comparison import FLOAT32_TOLERANCE
from engines import Engines
from jobs import Completion, Job, Phase, Request
from workloads import greedy, prompt

NEAR_TIE = 2 * FLOAT32_TOLERANCE
"""In float32 the choice between two tokens may depend on the batch where their log-probabilities are nearer."""


@dataclass(frozen=True)
class Question:
    """A prompt, and the tokens that every server must answer greedily, whatever else it is at."""

    prompt: list[int]
    answer: list[int]


def ask_stock(
    engines: Engines,
    model: str,
    prompts: list[list[int]],
    max_tokens: list[int],
    **engine: Any,
) -> list[Question]:
    """What stock vLLM answers to each prompt in float32: `max_tokens` tokens, or those before its first near-tie.

    A prompt that begins with a near-tie is left out. `engine` are keyword arguments of vLLM's LLM.
    """
    asked = [Request(tokens, greedy(limit)) for tokens, limit in zip(prompts, max_tokens, strict=True)]
    result = engines.run(Job(model, [Phase("questions", asked)], engine, kv_memory_mib=1024), deadline=300.0)
    answers = [_before_near_tie(request.completions[0]) for request in result.phases[0].requests]
    return [Question(*pair) for pair in zip(prompts, answers, strict=True) if pair[1]]


def _before_near_tie(completion: Completion) -> list[int]:
    for position, logprobs in enumerate(completion.logprobs):
        first, second = sorted(logprobs.values(), reverse=True)[:2]
        if first - second < NEAR_TIE:
            return completion.token_ids[:position]
    return completion.token_ids


def mixed_prompts(count: int, seed: int, longest: int) -> list[list[int]]:
    """Prompts of mixed length up to `longest` tokens: half are short, and one in three begins as others do."""
    rng = random.Random(seed)
    beginnings = [prompt(longest // 4, seed=rng.randrange(1 << 30)) for _ in range(4)]
    found = []
    for _ in range(count):
        length = rng.choice(
            (rng.randint(1, 64), rng.randint(1, 64), rng.randint(64, 300), rng.randint(1, longest))
        )
        tokens = prompt(length, seed=rng.randrange(1 << 30))
        if rng.random() < 1 / 3:
            tokens = (rng.choice(beginnings) + tokens)[:longest]
        found.append(tokens)
    return found
