"""Requests with and without images, videos and sounds in one batch generate what they generate in stock vLLM."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import runners
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase, Request
from models import ModelZoo
from multimodal_models import MULTIMODAL
from workloads import greedy, prompt

SHAPES = {
    "image": ([60, 50], [112, 84], [40, 130]),
    "video": ([4, 56, 56], [6, 56, 84], [2, 84, 56]),
    "audio": ([16_000], [40_000], [5_000]),
}

WHOLE = "gemma3_vision"
"""Its images see their own tokens whole, which vLLM's backend for CPUs does not do: see test_bidirectional_spans.py."""

ALWAYS_RUN = "qwen2_audio"

ENGINE = {"max_num_batched_tokens": 144, "max_num_seqs": 16}
"""In chunks, which end within inputs; the encoder's outputs of so many tokens are kept."""


def requests(family: str, max_tokens: int = 12) -> list[Request]:
    """Prompts with several inputs, with the same ones, and with none; the longest are cut into chunks."""
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


def job(zoo: ModelZoo, family: str, **more: object) -> Job:
    if MULTIMODAL[family].needs_torchvision and find_spec("torchvision") is None:
        pytest.skip("its processor needs torchvision: docs/testing.md")
    prompts = requests(family)
    return replace(Job(zoo(family), [Phase("cold", prompts), Phase("warm", prompts)], ENGINE), **more)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != ALWAYS_RUN))
        for name in MULTIMODAL
        if name != WHOLE
    ],
)
def test_family(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    stock, lamina = engines.pair(job(model_zoo, family))
    assert_same(stock, lamina)
    assert lamina.phase("warm").prefix_cache_hits == stock.phase("warm").prefix_cache_hits > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in MULTIMODAL if name != WHOLE])
def test_family_on_v2(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    stock, lamina = engines.pair(job(model_zoo, family, runner=runners.V2))
    assert_same(stock, lamina)
