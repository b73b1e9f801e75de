"""Every supported model family generates what it generates in stock vLLM, with a cold and with a warm prefix cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import runners
import torch
import transformers
from comparison import FLOAT32_TIE, FLOAT32_TOLERANCE, assert_same
from engines import Engines
from jobs import Job, JobResult, Phase
from model_specs import (
    EXPANDED,
    EXPANDED_IN_STOCK,
    LATENT,
    LAYERED_ON,
    NEEDS_TRITON,
    PLAIN_ROTARY,
    SUPPORTED,
    TOLERANCES,
)
from models import ModelZoo
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


@pytest.mark.slow
@pytest.mark.parametrize(("family", "runner"), LAYERED_ON)
def test_layered_family(engines: Engines, model_zoo: ModelZoo, family: str, runner: str) -> None:
    """In chunks, so that prompts go on beyond a window, over chunks of one that are local, and over many blocks.

    What the default run has of these: recovery/test_kinds_of_models.py.
    """
    # Stock vLLM's own attention is interpreted where it needs Triton.
    prompts = (
        requests((5, 40, 300), max_tokens=8) if family in NEEDS_TRITON else requests((*EDGE_LENGTHS, 600))
    )
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    engine = {"max_num_batched_tokens": 208, "max_num_seqs": 16}
    stock, lamina = engines.pair(Job(model_zoo(family), phases, engine, runner=runner))
    assert_same(stock, lamina, TOLERANCES.get(family, FLOAT32_TOLERANCE))
    assert lamina.phase("cold").prefix_cache_hits == 0
    assert lamina.phase("warm").prefix_cache_hits == stock.phase("warm").prefix_cache_hits > 0


LATENT_ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two lanes": ({}, {}),
    "one lane, short blocks": ({"lamina_batches": 1, "block_size": 32}, {}),
    "head, 2 workers": ({"lamina_partition": "head"}, {"worker_memory_mib": (64, 64)}),
    "sequence, 2 workers": (
        {"lamina_partition": "sequence", "block_size": 64},
        {"worker_memory_mib": (32, 64)},
    ),
    "request, 3 workers": ({"lamina_partition": "request"}, {"worker_memory_mib": (16, 32, 64)}),
    "lanes at random": ({}, {"random_lanes": 7}),
    "2 ranks": ({"tensor_parallel_size": 2}, {}),
    "keys and values": ({}, {"environment": EXPANDED}),
}
"""Options of the engine, and what else differs of the job. What runs by default is the first."""


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(
            family, name, marks=[pytest.mark.slow] * ((family, name) != ("deepseek_v3", "two lanes"))
        )
        for family in LATENT
        for name in (LATENT_ENGINES if family == "deepseek_v3" else ["two lanes"])
    ],
)
def test_latent_family(engines: Engines, model_zoo: ModelZoo, family: str, name: str) -> None:
    """In chunks and with a prefix cache, neither of which stock vLLM has for these on a CPU."""
    prompts = requests((*EDGE_LENGTHS, 600))
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    job = Job(model_zoo(family), phases, {"compilation_config": PLAIN_ROTARY})
    options, changes = LATENT_ENGINES[name]
    engine = job.engine | {"max_num_batched_tokens": 208, "max_num_seqs": 16} | options
    judge = replace(job, environment=EXPANDED) if family in EXPANDED_IN_STOCK else job
    stock, lamina = engines.run(judge), engines.run(replace(job, executor="lamina", engine=engine, **changes))
    assert_same(stock, lamina)
    assert lamina.phase("cold").prefix_cache_hits == 0
    assert lamina.phase("warm").prefix_cache_hits > 0
    if family == "deepseek_v2":
        assert_as_transformers(model_zoo(family), phases[0], lamina)


def assert_as_transformers(model: str, phase: Phase, result: JobResult) -> None:
    """Every token is the likeliest one by transformers, which keeps no latent cache, or as good as that."""
    judge = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for request, answer in zip(phase.requests, result.phase(phase.name).requests, strict=True):
        completion = answer.completions[0]
        tokens = request.prompt + completion.token_ids
        with torch.inference_mode():
            logits = judge(torch.tensor([tokens])).logits[0, len(request.prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for position, (token, logprobs) in enumerate(
            zip(completion.token_ids, completion.logprobs, strict=True)
        ):
            assert expected[position, token] > expected[position].max() - FLOAT32_TIE
            assert abs(expected[position, token] - logprobs[token]) < 1e-3


@pytest.mark.slow
def test_latent_family_on_v2(engines: Engines, model_zoo: ModelZoo) -> None:
    phases = [
        Phase("all", requests((1, 40, 300), max_tokens=8)),
        Phase("warm", requests((300,), max_tokens=8)),
    ]
    job = Job(model_zoo("deepseek_v2"), phases, {"compilation_config": PLAIN_ROTARY}, runner=runners.V2)
    stock = engines.run(job)
    assert_same(
        stock,
        engines.run(replace(job, executor="lamina", engine=job.engine | {"max_num_batched_tokens": 64})),
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_one_group(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    """Without vLLM's hybrid manager a group holds layers with a window and without, and keeps every token."""
    prompts = requests((*EDGE_LENGTHS, 600))
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    engine = {"max_num_batched_tokens": 208, "max_num_seqs": 16, "disable_hybrid_kv_cache_manager": True}
    stock, lamina = engines.pair(Job(model_zoo(family), phases, engine))
    assert_same(stock, lamina)
    assert lamina.phase("warm").prefix_cache_hits == stock.phase("warm").prefix_cache_hits > 0
