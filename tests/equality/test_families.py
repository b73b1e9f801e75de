"""Every supported model family generates what it generates in stock vLLM, with a cold and with a warm prefix cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import runners
import torch
import transformers
from comparison import FLOAT32_TIE, FLOAT32_TOLERANCE, assert_same
from engines import Engines, JobFailed
from jobs import Job, JobResult, Phase
from models import LATENT, LAYERED, NEEDS_TRITON, PLAIN_ROTARY, SUPPORTED, ModelZoo
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
    stock, lamina = engines.run(job), engines.run(replace(job, executor="lamina", engine=engine, **changes))
    assert_same(stock, lamina)
    assert lamina.phase("cold").prefix_cache_hits == stock.phase("warm").prefix_cache_hits == 0
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
@pytest.mark.parametrize("family", NEEDS_TRITON)
def test_a_family_with_a_backend_of_its_own(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    job = Job(model_zoo(family), [], {"max_model_len": 512}, executor="lamina", runner=runners.V2)
    with pytest.raises(JobFailed, match=r"does not support other attention options .* attn_backend='Triton"):
        engines.run(job)
