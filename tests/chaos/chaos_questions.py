"""The questions that clients ask under storms."""

from __future__ import annotations

import random

from engines import Engines
from questions import Question, ask_stock, mixed_prompts

NUM_QUESTIONS = 240
LONGEST_PROMPT = 1024
MOST_TOKENS = 160


def make_questions(engines: Engines, model: str, count: int = NUM_QUESTIONS) -> list[Question]:
    """Always the same ones for a model, with the answers of stock vLLM."""
    rng = random.Random(0)
    prompts = mixed_prompts(count, 0, LONGEST_PROMPT)
    limits = [rng.randint(1, MOST_TOKENS) for _ in prompts]
    return ask_stock(engines, model, prompts, limits, max_model_len=2048)
