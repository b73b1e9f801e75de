"""Requests of multimodal models, with several inputs, with the same ones, and with none."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
from jobs import Job, Phase, Request
from models import ModelZoo
from multimodal_models import MULTIMODAL
from workloads import greedy, prompt

SHAPES = {
    "image": ([60, 50], [112, 84], [40, 130]),
    "video": ([4, 56, 56], [6, 56, 84], [2, 84, 56]),
    "audio": ([16_000], [40_000], [5_000]),
}
SHAPES["vision_chunk"] = SHAPES["image"]

ENGINE = {"max_num_batched_tokens": 144, "max_num_seqs": 16}
"""In chunks, which end within inputs; the encoder's outputs of so many tokens are kept."""


def requests(family: str, max_tokens: int) -> list[Request]:
    """Prompts of which the longest are cut into chunks."""
    made = []
    for kind, mark in MULTIMODAL[family].prompts.items():
        first, second, third = ((list(shape), seed) for seed, shape in enumerate(SHAPES[kind]))
        for index, (inputs, length) in enumerate(
            (([first], 20), ([], 40), ([first, second], 137), ([second, first, third], 300), ([third] * 2, 5))
        ):
            tokens = prompt(length, index)
            for place in range(len(inputs), 0, -1):
                at = length * place // (len(inputs) + 1)
                tokens[at:at] = mark
            made.append(Request(tokens, greedy(max_tokens), media={kind: inputs} if inputs else {}))
    return made


def job(zoo: ModelZoo, family: str, max_tokens: int = 12, **more: Any) -> Job:
    """They run twice, the second time with a warm prefix cache; skips the test where the model cannot run."""
    if MULTIMODAL[family].needs_torchvision and find_spec("torchvision") is None:
        pytest.skip("its processor needs torchvision: docs/testing.md")
    prompts = requests(family, max_tokens)
    engine = ENGINE | MULTIMODAL[family].engine
    return replace(Job(zoo(family), [Phase("cold", prompts), Phase("warm", prompts)], engine), **more)
