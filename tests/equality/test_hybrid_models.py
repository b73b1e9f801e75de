"""Models that keep a state beside their KV generate what they generate in stock vLLM."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import runners
from comparison import Rounding, assert_close_to, assert_same
from engines import Engines
from hybrid_specs import DELTA_NET, HYBRID
from jobs import Job, Phase
from model_specs import PLAIN_ROTARY
from models import ModelZoo
from workloads import EDGE_LENGTHS, requests

ENGINE = {
    "compilation_config": PLAIN_ROTARY,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 208,
    "max_num_seqs": 6,
}
"""Prompts in chunks, and more requests than states, so that blocks of states are used again."""

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two lanes": ({}, {}),
    "one lane": ({"lamina_batches": 1}, {}),
    "preemption": ({"num_gpu_blocks_override": 10}, {}),
    "preemption, one lane": ({"num_gpu_blocks_override": 10, "lamina_batches": 1}, {}),
    "head, 2 workers": ({"lamina_partition": "head"}, {"worker_memory_mib": (64, 64)}),
    "sequence, 2 workers": ({"lamina_partition": "sequence"}, {"worker_memory_mib": (32, 64)}),
    "request, 3 workers": ({"lamina_partition": "request"}, {"worker_memory_mib": (16, 32, 64)}),
    "lanes at random": ({}, {"random_lanes": 7}),
    "2 ranks": ({"tensor_parallel_size": 2}, {}),
}
"""Options of the engine, and what else differs of the job."""


def phases() -> list[Phase]:
    prompts = requests((*EDGE_LENGTHS, 600))
    growing = requests((100,) * 6, max_tokens=40)
    return [Phase("mixed", prompts), Phase("growing", growing), Phase("again", prompts)]


@pytest.mark.parametrize(
    ("family", "way"),
    [
        pytest.param(family, way, marks=[pytest.mark.slow] * ((family, way) != ("falcon_h1", "two lanes")))
        for family in HYBRID
        for way in (WAYS if family == "falcon_h1" else ["two lanes", "one lane"])
    ],
)
def test_hybrid_family(engines: Engines, model_zoo: ModelZoo, family: str, way: str) -> None:
    job = Job(model_zoo(family), phases(), ENGINE)
    options, changes = WAYS[way]
    lamina = engines.run(replace(job, executor="lamina", engine=ENGINE | options, **changes))
    assert_same(engines.run(job), lamina)
    assert (lamina.phase("growing").preemptions > 0) == ("preemption" in way)


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRID)
def test_hybrid_family_on_v2(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    few = [Phase("all", requests((1, 40, 300), max_tokens=8))]
    stock, lamina = engines.pair(Job(model_zoo(family), few, ENGINE, runner=runners.V2))
    assert_same(stock, lamina)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["two lanes", "one lane"])
@pytest.mark.parametrize("family", DELTA_NET)
def test_gated_delta_net(engines: Engines, model_zoo: ModelZoo, family: str, way: str) -> None:
    if family == "qwen3_5" and find_spec("torchvision") is None:
        pytest.skip("vLLM's module of it needs torchvision: docs/testing.md")
    engine = ENGINE | {"dtype": "bfloat16"}
    job = Job(model_zoo(family), phases(), engine)
    lamina = replace(job, executor="lamina", engine=engine | WAYS[way][0])
    assert_close_to(engines.run(job), engines.run(lamina), Rounding(logprob_tolerance=0.2, margin=0.2))
