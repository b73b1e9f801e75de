"""Models that keep a state beside their KV generate what they generate in stock vLLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
from comparison import FLOAT32_TOLERANCE, assert_same
from engines import Engines
from jobs import Job, Phase
from models import HYBRID, PLAIN_ROTARY, ModelZoo
from workloads import EDGE_LENGTHS, requests

ALWAYS_RUN = "falcon_h1"

TOLERANCES: dict[str, float] = {}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name != ALWAYS_RUN)) for name in HYBRID]
)
def test_hybrid_family(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    """In chunks, in two lanes and in one; more requests than states, so that blocks of states are used again."""
    prompts = requests((*EDGE_LENGTHS, 600))
    engine = {
        "compilation_config": PLAIN_ROTARY,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 208,
        "max_num_seqs": 6,
    }
    job = Job(model_zoo(family), [Phase("cold", prompts), Phase("again", prompts)], engine)
    stock, lamina = engines.pair(job)
    assert_same(stock, lamina, TOLERANCES.get(family, FLOAT32_TOLERANCE))
    one_lane = replace(job, executor="lamina", engine=engine | {"lamina_batches": 1})
    assert_same(stock, engines.run(one_lane), TOLERANCES.get(family, FLOAT32_TOLERANCE))
