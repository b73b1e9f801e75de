"""Images whose tokens see each other whole, as in transformers: vLLM's own backend for CPUs masks them causally."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import runners
from engines import Engines
from jobs import Job, Phase, Request, RequestResult
from media import one
from models import ModelZoo
from multimodal_models import MULTIMODAL, transformers_model
from multimodal_spec import BEGIN, END, IMAGE, mark
from workloads import greedy, prompt

FAMILIES = {
    "gemma3_vision": (mark(BEGIN), "token_type_ids"),
    "gemma4_whole": (mark(IMAGE), "mm_token_type_ids"),
}
"""What stands for an image in a prompt, and the argument by which transformers is told which tokens are an image's."""

TOLERANCE = 2e-3
SHAPE = [120, 90]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("torchvision") is None, reason="its processor needs torchvision: docs/testing.md"
    ),
]


def requests(image: int) -> list[Request]:
    """Images behind windows, at the edges of chunks, twice the same, and none."""
    made = []
    for index, (lengths, seeds) in enumerate(
        (((20, 10), [0]), ((100, 30), [1]), ((50,), []), ((5, 90, 40), [0, 2]), ((110, 3), [1]))
    ):
        tokens: list[int] = []
        for place, length in enumerate(lengths):
            tokens += prompt(length, 10 * index + place) + [image] * (place < len(seeds))
        media = {"image": [(SHAPE, seed) for seed in seeds]} if seeds else {}
        made.append(Request(tokens, greedy(10), media=media))
    return made


@pytest.fixture
def judge(model_zoo: ModelZoo, family: str) -> object:
    import torch
    import transformers

    placeholder, types = FAMILIES[family]
    model = transformers_model(family).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(model_zoo(family))

    def likelihoods(request: Request, output: list[int], whole: bool) -> np.ndarray:
        """Log-probabilities at each output token, with images that see each other whole or causally."""
        images = [one("image", shape, seed) for shape, seed in request.media.get("image", [])]
        pixels = dict(processor(images, return_tensors="pt")) if images else {}
        numbers = iter(pixels.pop("num_soft_tokens_per_image", [16] * len(images)))
        pixels.pop("num_crops", None)
        around = [mark("\n\n")] * (family == "gemma3_vision")
        tokens = []
        for token in request.prompt:
            if token == placeholder:
                tokens += [*around, mark(BEGIN), *[mark(IMAGE)] * int(next(numbers)), mark(END), *around]
            else:
                tokens.append(token)
        ids = torch.tensor([tokens + output])
        seen = (ids == mark(IMAGE)).long() if whole else torch.zeros_like(ids)
        with torch.no_grad():
            logits = model(input_ids=ids, **pixels, **{types: seen}).logits
        return logits[0, len(tokens) - 1 : -1].log_softmax(-1).numpy()

    return likelihoods


def error(result: RequestResult, expected: np.ndarray) -> float:
    [completion] = result.completions
    return max(
        abs(logprob - expected[position, token])
        for position, likely in enumerate(completion.logprobs)
        for token, logprob in likely.items()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_seen_whole(engines: Engines, model_zoo: ModelZoo, judge, family: str) -> None:  # type: ignore[no-untyped-def]
    prompts = requests(FAMILIES[family][0])
    engine = {"max_num_batched_tokens": 128, "max_num_seqs": 16} | MULTIMODAL[family].engine
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    # With V2 vLLM 0.32 leaves images that are longer than a window causal.
    runner = runners.V1 if family == "gemma4_whole" else runners.DEFAULT
    lamina = engines.run(Job(model_zoo(family), phases, engine, executor="lamina", runner=runner))
    assert lamina.phase("warm").prefix_cache_hits > 0
    causal = 0.0
    for phase in lamina.phases:
        for request, result in zip(prompts, phase.requests, strict=True):
            output = result.completions[0].token_ids
            assert error(result, judge(request, output, whole=True)) < TOLERANCE
            causal = max(causal, error(result, judge(request, output, whole=False)))
    assert causal > 10 * TOLERANCE, "the mask makes no difference"
