"""Requests with and without images, videos and sounds in one batch generate what they generate in stock vLLM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runners
from comparison import FLOAT32_TOLERANCE, Rounding, assert_close_to, assert_same, assert_same_until_aborted
from engines import Engines
from jobs import Job, JobResult
from models import ATTENTION_MODULES, MLP_MODULES, ModelZoo, create_adapter
from multimodal_models import MULTIMODAL
from multimodal_requests import job

WHOLE = ("gemma3_vision", "gemma4_whole")
"""Their images see their own tokens whole, which vLLM's backend for CPUs does not do: test_bidirectional_spans.py."""

LATENT = ("kimi_k25",)
"""Stock vLLM has no prefix cache for them here."""

V1_ALONE = ("qwen3_5_vl",)
"""Stock vLLM's logits are not numbers on V2, as a CPU interprets it."""

TOLERANCES = {"granite4_vision": 1e-3}
"""Of log-probabilities: stock is 4.4e-4 from itself where the same prompts are cut into other chunks."""

ALWAYS_RUN = "qwen2_audio"


def assert_equal(family: str, stock: JobResult, lamina: JobResult) -> None:
    if MULTIMODAL[family].engine.get("dtype") == "bfloat16":
        assert_close_to(stock, lamina, Rounding(logprob_tolerance=0.2, margin=0.2))
    else:
        assert_same(stock, lamina, TOLERANCES.get(family, FLOAT32_TOLERANCE))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != ALWAYS_RUN))
        for name in MULTIMODAL
        if name not in WHOLE
    ],
)
def test_family(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    stock, lamina = engines.pair(job(model_zoo, family))
    assert_equal(family, stock, lamina)
    hits = [result.phase("warm").prefix_cache_hits for result in (stock, lamina)]
    assert (hits[1] > 0) == MULTIMODAL[family].caches_prefixes
    assert hits[0] == hits[1] or family in LATENT


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in MULTIMODAL if name not in WHOLE + V1_ALONE])
def test_family_on_v2(engines: Engines, model_zoo: ModelZoo, family: str) -> None:
    stock, lamina = engines.pair(job(model_zoo, family, runner=runners.V2))
    assert_equal(family, stock, lamina)


def in_lamina(engines: Engines, stock: Job, engine: dict[str, Any], **more: Any) -> JobResult:
    """What Lamina makes of stock's job, with these options beside its own."""
    return engines.run(replace(stock, executor="lamina", engine=stock.engine | engine, **more))


# Arguments of the job, and options of the engine.
CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one batch": ({}, {"lamina_batches": 1}),
    "lanes at random": ({"random_lanes": 3}, {}),
    "two workers": ({"worker_memory_mib": (64, 64)}, {"lamina_partition": "sequence"}),
    "few blocks": ({"kv_memory_mib": 2}, {"max_model_len": 512, "block_size": 32}),
    "few inputs at a time": ({}, {"max_num_batched_tokens": 40}),
}


@pytest.mark.slow
@pytest.mark.parametrize("condition", CONDITIONS)
def test_condition(engines: Engines, model_zoo: ModelZoo, condition: str) -> None:
    stock = job(model_zoo, "qwen2_vl", max_tokens=60)
    changes, options = CONDITIONS[condition]
    lamina = in_lamina(engines, stock, options, **changes)
    assert_same(engines.run(stock), lamina)
    assert (lamina.phase("cold").preemptions > 0) == (condition == "few blocks")


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_aborts_within_inputs(engines: Engines, model_zoo: ModelZoo, batches: int) -> None:
    """Before the first token, while steps encode and chunks end within inputs; the same inputs come again."""
    stock = job(model_zoo, "llava")
    [wanted, _] = stock.phases
    aborted = [
        replace(request, abort_after=0, abort_delay=delay)
        for delay in (1, 2, 3)
        for request in wanted.requests
    ]
    mixed = [request for pair in zip(aborted, wanted.requests * 3, strict=True) for request in pair]
    lamina = in_lamina(
        engines, replace(stock, phases=[replace(wanted, requests=mixed)]), {"lamina_batches": batches}
    )
    whole = engines.run(stock).phase("cold").requests * 3
    for request, result in zip(whole, lamina.phase("cold").requests[1::2], strict=True):
        assert_same_until_aborted(request.completions[0], result.completions[0])


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_adapters(engines: Engines, model_zoo: ModelZoo, tmp_path: Path, batches: int) -> None:
    """Of the decoder."""
    plain = job(model_zoo, "llava")
    adapters = [
        str(create_adapter(Path(plain.model), tmp_path / f"adapter-{i}", 8, modules, seed=i))
        for i, modules in enumerate((ATTENTION_MODULES + MLP_MODULES, ("q_proj", "v_proj")))
    ]
    phases = [
        replace(
            phase,
            requests=[replace(request, adapter=adapters[i % 2]) for i, request in enumerate(phase.requests)],
        )
        for phase in plain.phases
    ]
    stock = replace(plain, phases=phases, engine=plain.engine | {"enable_lora": True, "max_loras": 2})
    assert_same(engines.run(stock), in_lamina(engines, stock, {"lamina_batches": batches}))
    changed, unchanged = (engines.run(its).phase("cold").requests for its in (stock, plain))
    assert all(
        one.completions[0].token_ids != other.completions[0].token_ids
        for one, other in zip(changed, unchanged, strict=True)
    ), "an adapter makes no difference"
