"""Prompts and sampling parameters that tests with whole engines are made of."""

from __future__ import annotations

import random
from typing import Any

from jobs import Request
from model_specs import VOCAB_SIZE
from models import NUM_SPECIAL_TOKENS

# Lengths at, below and above the sizes of KV blocks and kernel tiles, and a few tokens of context for a short query.
EDGE_LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129, 300)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids, without special tokens; the same for the same length and seed."""
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(NUM_SPECIAL_TOKENS, VOCAB_SIZE) for _ in range(length)]


def greedy(max_tokens: int, **more: Any) -> dict[str, Any]:
    """Exactly `max_tokens` of the likeliest tokens, with the log-probabilities of the two likeliest."""
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 2} | more


def sampled(max_tokens: int, seed: int, **more: Any) -> dict[str, Any]:
    return greedy(max_tokens, temperature=1.0, seed=seed) | more


def requests(lengths: tuple[int, ...], max_tokens: int = 16, seed: int = 0) -> list[Request]:
    """Greedy requests with prompts of these lengths, all different."""
    return [Request(prompt(length, seed + i), greedy(max_tokens)) for i, length in enumerate(lengths)]
