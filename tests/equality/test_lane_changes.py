"""Requests keep their tokens while one lane or two are in use by turns, whatever the lanes' input batches still hold.

Where requests may move they go from lane to lane and back again; elsewhere they enter either, and come back to it when
they were preempted. Whatever a request can ask for is among them: no state behind it is lost. And each step, as the
attention workers are told of it by the scheduler's output alone, is the one that vLLM's own tensors describe.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase, Request
from models import ATTENTION_MODULES, EOS, MLP_MODULES, ModelZoo, create_adapter
from workloads import greedy, prompt, sampled

PREFIX = prompt(150)

ASKED: list[tuple[list[int], dict[str, Any], int | None]] = [
    (prompt(3), greedy(60, repetition_penalty=1.1, presence_penalty=0.5), 0),
    (prompt(40), sampled(100, seed=3, top_k=40), None),
    (
        prompt(130),
        greedy(300, structured_outputs={"regex": "([0-9]{1,9} ){40}"}, ignore_eos=False),
        1,
    ),
    (
        prompt(200),
        greedy(
            180,
            logit_bias={"50": 4.0, "60": 3.5},
            bad_words=["a", "b"],
            allowed_token_ids=list(range(4, 600)),
        ),
        1,
    ),
    (
        [*PREFIX, 9],
        sampled(220, seed=4, ignore_eos=False, logit_bias={str(EOS): 8.0}, min_tokens=150),
        None,
    ),
    ([*PREFIX, 5, 6], greedy(260), 0),
]
"""Prompt, parameters and number of the adapter of each request."""


@pytest.fixture
def adapters(model_zoo: ModelZoo, tmp_path: Path) -> list[str]:
    model = Path(model_zoo("llama"))
    return [
        str(create_adapter(model, tmp_path / f"adapter-{i}", 4, modules, seed=i))
        for i, modules in enumerate([ATTENTION_MODULES, MLP_MODULES])
    ]


def test_lanes_change_at_random(engines: Engines, model_zoo: ModelZoo, adapters: list[str]) -> None:
    requests = [
        Request(tokens, params, adapter=None if adapter is None else adapters[adapter])
        for tokens, params, adapter in ASKED
    ]
    # One slot more than adapters: see test_lora.py.
    stock = Job(model_zoo("llama"), [Phase("all", requests)], {"enable_lora": True, "max_loras": 3})
    # A pool that does not hold all of them.
    result = engines.run(replace(stock, executor="lamina", kv_memory_mib=2, random_lanes=0))
    assert_same(engines.run(stock), result)
    assert result.phase("all").preemptions > 0
    assert result.counts["lane changes"] > 10
    assert result.counts["checked steps"] > 300
