"""Images whose tokens see each other whole, as in transformers: vLLM's own backend for CPUs masks them causally."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from engines import Engines
from jobs import Job, Phase, Request, RequestResult
from media import one
from models import ModelZoo
from multimodal_models import transformers_model
from multimodal_spec import BEGIN, END, IMAGE, mark
from workloads import greedy, prompt

FAMILY = "gemma3_vision"
TOLERANCE = 2e-3
SHAPE = [120, 90]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("torchvision") is None, reason="its processor needs torchvision: docs/testing.md"
    ),
]


def requests() -> list[Request]:
    """Images behind windows, at the edges of chunks, twice the same, and none."""
    made = []
    for index, (lengths, seeds) in enumerate(
        (((20, 10), [0]), ((100, 30), [1]), ((50,), []), ((5, 90, 40), [0, 2]), ((110, 3), [1]))
    ):
        tokens: list[int] = []
        for place, length in enumerate(lengths):
            tokens += prompt(length, 10 * index + place) + [mark(BEGIN)] * (place < len(seeds))
        media = {"image": [(SHAPE, seed) for seed in seeds]} if seeds else {}
        made.append(Request(tokens, greedy(10), media=media))
    return made


@pytest.fixture(scope="module")
def judge(model_zoo: ModelZoo) -> object:
    import torch
    import transformers

    model = transformers_model(FAMILY).eval()
    processor = transformers.Gemma3ImageProcessor.from_pretrained(model_zoo(FAMILY))

    def likelihoods(request: Request, output: list[int], whole: bool) -> np.ndarray:
        """Log-probabilities at each output token, with images that see each other whole or causally."""
        tokens = []
        newlines, image = [mark("\n\n")], [mark(BEGIN), *[mark(IMAGE)] * 16, mark(END)]
        for token in request.prompt:
            tokens += [*newlines, *image, *newlines] if token == mark(BEGIN) else [token]
        ids = torch.tensor([tokens + output])
        images = [one("image", shape, seed) for shape, seed in request.media.get("image", [])]
        pixels = processor(images, return_tensors="pt")["pixel_values"] if images else None
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                pixel_values=pixels,
                token_type_ids=(ids == mark(IMAGE)).long() if whole else torch.zeros_like(ids),
            ).logits
        return logits[0, len(tokens) - 1 : -1].log_softmax(-1).numpy()

    return likelihoods


def error(result: RequestResult, expected: np.ndarray) -> float:
    [completion] = result.completions
    return max(
        abs(logprob - expected[position, token])
        for position, likely in enumerate(completion.logprobs)
        for token, logprob in likely.items()
    )


def test_images_are_seen_whole(engines: Engines, model_zoo: ModelZoo, judge) -> None:  # type: ignore[no-untyped-def]
    prompts = requests()
    engine = {"max_num_batched_tokens": 128, "max_num_seqs": 16}
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    lamina = engines.run(Job(model_zoo(FAMILY), phases, engine, executor="lamina"))
    assert lamina.phase("warm").prefix_cache_hits > 0
    causal = 0.0
    for phase in lamina.phases:
        for request, result in zip(prompts, phase.requests, strict=True):
            output = result.completions[0].token_ids
            assert error(result, judge(request, output, whole=True)) < TOLERANCE
            causal = max(causal, error(result, judge(request, output, whole=False)))
    assert causal > 10 * TOLERANCE, "the mask makes no difference"
