"""Every supported model family generates what it generates in stock vLLM, with a cold and with a warm prefix cache."""

from __future__ import annotations

import pytest
import runners
from comparison import FLOAT32_TOLERANCE, assert_same
from engines import Engines, JobFailed
from jobs import Job, Phase
from models import LAYERED, NEEDS_TRITON, SUPPORTED, ModelZoo
from workloads import EDGE_LENGTHS, requests

MUCH_AS_LLAMA = {"mistral", "qwen2"}

TOLERANCES = {"gemma3n": 5e-4}
"""Of log-probabilities where norms of large weights, which such a random model needs, enlarge what is rounded."""

ALWAYS_RUN = {"gemma4_shared", "gpt_oss", "llama4"}
"""Of the layered models: windows over blocks of two sizes and layers that read what others keep, sinks, chunks."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in MUCH_AS_LLAMA)) for name in SUPPORTED],
)
def test_family(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    prompts = requests((*EDGE_LENGTHS, 600))
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    stock, lamina = engines.pair(Job(model_zoo(family), phases))
    assert_same(stock, lamina)
    assert lamina.phase("cold").prefix_cache_hits == 0
    assert lamina.phase("warm").prefix_cache_hits > 0


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ALWAYS_RUN))
        for name in LAYERED
        if name not in NEEDS_TRITON
    ],
)
def test_layered_family(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    """In chunks, so that prompts go on beyond a window, over chunks of one that are local, and over many blocks."""
    prompts = requests((*EDGE_LENGTHS, 600))
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    engine = {"max_num_batched_tokens": 208, "max_num_seqs": 16}
    stock, lamina = engines.pair(Job(model_zoo(family), phases, engine))
    assert_same(stock, lamina, TOLERANCES.get(family, FLOAT32_TOLERANCE))
    assert lamina.phase("cold").prefix_cache_hits == 0
    assert lamina.phase("warm").prefix_cache_hits == stock.phase("warm").prefix_cache_hits > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", NEEDS_TRITON)
def test_a_family_with_a_backend_of_its_own(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    job = Job(model_zoo(family), [], {"max_model_len": 512}, executor="lamina", runner=runners.V2)
    with pytest.raises(JobFailed, match=r"does not support other attention options .* attn_backend='Triton"):
        engines.run(job)
