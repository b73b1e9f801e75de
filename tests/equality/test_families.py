"""Every supported model family generates what it generates in stock vLLM, with a cold and with a warm prefix cache."""

from __future__ import annotations

import pytest
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase
from models import SUPPORTED, ModelZoo
from workloads import EDGE_LENGTHS, requests

MUCH_AS_LLAMA = {"mistral", "qwen2"}


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
