"""State that vLLM keeps for a request beside its tokens, where others come and go in both lanes: none is lost."""

from __future__ import annotations

import pytest
import runners
from comparison import assert_same_phase
from engines import Engines
from jobs import Job, JobResult, Phase, Request
from models import NUM_SPECIAL_TOKENS, ModelZoo
from workloads import greedy, prompt, sampled

START, END = "<think>", "</think>"
START_IDS = [NUM_SPECIAL_TOKENS + ord(character) - ord("!") for character in START]

# The lanes' loads change all the time.
OTHERS = [Request(prompt(30 * i, seed=i), greedy(3 + 5 * i), after_step=4 * i) for i in range(1, 8)]

PHASES = [
    Phase(
        "logits processors that count",
        [Request(prompt(20, seed=i), greedy(40, extra_args={"every": 3 + i})) for i in range(5)] + OTHERS,
    ),
    Phase(
        "reasoning budgets",
        [
            Request(prompt(20, seed=i) + START_IDS, greedy(40, thinking_token_budget=5 * i))
            for i in range(1, 6)
        ]
        + OTHERS,
    ),
    # Their random sequences go on with each input.
    Phase(
        "sessions",
        [
            Request(
                prompt(20, seed=i),
                sampled(5 + i, seed=i),
                more=tuple(prompt(n, seed=i) for n in (3, 40, 100)),
            )
            for i in range(5)
        ]
        + OTHERS,
    ),
]


@pytest.fixture(scope="module")
def results(engines: Engines, model_zoo: ModelZoo) -> tuple[JobResult, JobResult]:
    engine = {
        "logits_processors": [runners.logits_processor("EveryNth")],
        "reasoning_config": {"reasoning_start_str": START, "reasoning_end_str": END},
    }
    return engines.pair(Job(model_zoo("llama"), PHASES, engine))


@pytest.mark.parametrize("name", [phase.name for phase in PHASES])
def test_state(results: tuple[JobResult, JobResult], name: str) -> None:
    stock, lamina = results
    assert_same_phase(stock.phase(name), lamina.phase(name))
