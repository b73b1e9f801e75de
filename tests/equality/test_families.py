"""Every supported model family generates what it generates in stock vLLM, with a cold and with a warm prefix cache."""

from __future__ import annotations

import pytest
import runners
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase
from models import LAYERED, NEEDS_TRITON, SUPPORTED, ModelZoo
from workloads import EDGE_LENGTHS, requests

MUCH_AS_LLAMA = {"mistral", "qwen2"}

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
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ALWAYS_RUN)) for name in LAYERED],
)
def test_layered_family(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    """In chunks, so that prompts go on beyond a window, over chunks of one that are local, and over many blocks."""
    interpreted = family in NEEDS_TRITON  # ten requests would take it minutes
    prompts = requests((31, 300), max_tokens=6) if interpreted else requests((*EDGE_LENGTHS, 600))
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    runner = runners.V2 if interpreted else runners.DEFAULT
    engine = {"max_num_batched_tokens": 208, "max_num_seqs": 16}
    job = Job(model_zoo(family), phases, engine, runner=runner)
    stock, lamina = engines.pair(job)
    assert_same(stock, lamina)
    assert lamina.phase("cold").prefix_cache_hits == 0
    assert lamina.phase("warm").prefix_cache_hits == stock.phase("warm").prefix_cache_hits > 0
