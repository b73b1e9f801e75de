"""LoRA adapters: requests with different ones and with none, in both lanes at once, give what stock vLLM gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from comparison import assert_same_phase, assert_same_until_aborted
from engines import Engines
from jobs import Job, Phase, PhaseResult, Request
from models import ATTENTION_MODULES, MLP_MODULES, ModelZoo, create_adapter
from workloads import greedy, prompt, sampled

# Rank and modules of each adapter. What one changes another leaves alone, and a slot is used by one after the other.
ADAPTERS = (
    (8, ATTENTION_MODULES + MLP_MODULES),
    (4, ("q_proj", "v_proj")),
    (16, (*MLP_MODULES, "lm_head")),
    (8, ("o_proj", "lm_head")),
    (2, ATTENTION_MODULES),
)
ENGINE = {"enable_lora": True, "max_lora_rank": 16}
PREFIX = prompt(140, seed=1)


def phases(adapters: list[str]) -> list[Phase]:
    choices = [*adapters, None]

    def choice(i: int) -> str | None:
        return choices[i % len(choices)]

    return [
        Phase(
            "together", [Request(prompt(7 * i + 3, seed=i), greedy(16), adapter=choice(i)) for i in range(12)]
        ),
        # The same prompt with one adapter and another: the prefix cache tells them apart.
        Phase(
            "one prompt",
            [Request(PREFIX + [9] * (i % 2), greedy(12), adapter=choice(i // 2)) for i in range(12)],
        ),
        Phase(
            "sampled", [Request(prompt(9, seed=i), sampled(16, seed=i), adapter=choice(i)) for i in range(6)]
        ),
        Phase(
            "arrivals",
            [
                Request(prompt(40 * i % 200 + 1, seed=i), greedy(16), after_step=2 * i, adapter=choice(i))
                for i in range(12)
            ],
        ),
        # A request that ends early leaves the step in flight, which goes on using its adapter, without a member of it.
        Phase(
            "aborts",
            [
                Request(
                    prompt(50, seed=i),
                    greedy(24),
                    after_step=i,
                    abort_after=2 + i % 5 if i % 3 == 0 else None,
                    adapter=choice(i),
                )
                for i in range(12)
            ],
        ),
    ]


@pytest.fixture(scope="session")
def adapters(model_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root, model = tmp_path_factory.mktemp("adapters"), Path(model_zoo("llama"))
    return [
        str(create_adapter(model, root / f"adapter-{i}", rank, modules, seed=i))
        for i, (rank, modules) in enumerate(ADAPTERS)
    ]


@pytest.fixture
def stock_job(model_zoo: ModelZoo, adapters: list[str]) -> Job:
    # vLLM 0.32 on CPU takes the last slot's adapter for requests without one (vllm-project/vllm#48421), so that slot
    # stays empty: slots are used from the first on.
    return Job(model_zoo("llama"), phases(adapters), ENGINE | {"max_loras": len(ADAPTERS) + 1})


def assert_same_requests(stock: PhaseResult, lamina: PhaseResult) -> None:
    if stock.name == "aborts":
        for theirs, ours in zip(stock.requests, lamina.requests, strict=True):
            assert_same_until_aborted(theirs.completions[0], ours.completions[0])
    else:
        assert_same_phase(stock, lamina)


@pytest.mark.parametrize("batches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_slot_for_each(engines: Engines, stock_job: Job, batches: int) -> None:
    stock = engines.run(stock_job)
    options = {"lamina_batches": batches}
    lamina = engines.run(replace(stock_job, engine=stock_job.engine | options, executor="lamina"))
    for theirs, ours in zip(stock.phases, lamina.phases, strict=True):
        assert_same_requests(theirs, ours)


@pytest.mark.parametrize("max_loras", [1, 2])
def test_more_adapters_than_slots(engines: Engines, stock_job: Job, max_loras: int) -> None:
    """Requests wait for a slot, and adapters take the place of others while the other lane computes."""
    stock = engines.run(stock_job)
    phases = [
        replace(phase, requests=[request for request in phase.requests if request.adapter is not None])
        for phase in stock_job.phases
    ]
    options = {"max_loras": max_loras, "max_cpu_loras": 4}
    lamina = engines.run(Job(stock_job.model, phases, ENGINE | options, executor="lamina"))
    for phase, theirs, ours in zip(stock_job.phases, stock.phases, lamina.phases, strict=True):
        same = [
            result
            for request, result in zip(phase.requests, theirs.requests, strict=True)
            if request.adapter is not None
        ]
        assert_same_requests(replace(theirs, requests=same), ours)


def test_adapters_matter(engines: Engines, stock_job: Job) -> None:
    """Equality alone would hold if no adapter were applied."""
    requests = engines.run(stock_job).phase("one prompt").requests
    assert len({tuple(request.completions[0].token_ids) for request in requests}) == len(requests)
