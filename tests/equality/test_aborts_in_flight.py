"""Requests that are aborted while their step is in flight, where each that runs needs the place of one that ran before.

vLLM takes in a waiting request at once. What the model runner keeps of the aborted one stays until its step is over.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import runners
from comparison import assert_same_until_aborted
from engines import Engines
from jobs import Job, Phase, Request
from models import ModelZoo
from workloads import greedy, prompt


@pytest.mark.parametrize("runner", [pytest.param(runners.V1, marks=pytest.mark.slow), runners.V2])
def test_two_places(engines: Engines, model_zoo: ModelZoo, runner: str) -> None:
    requests = [
        Request(prompt(10 + i, seed=i), greedy(12, presence_penalty=1.0), abort_after=2, abort_delay=i % 3)
        for i in range(7)
    ]
    requests.append(Request(prompt(30, seed=30), greedy(12, presence_penalty=1.0)))
    stock = Job(model_zoo("llama"), [Phase("aborts", requests)], {"max_num_seqs": 2}, runner=runner)
    expected, actual = engines.run(stock), engines.run(replace(stock, executor="lamina", random_lanes=1))
    for theirs, ours in zip(expected.phases[0].requests, actual.phases[0].requests, strict=True):
        assert_same_until_aborted(theirs.completions[0], ours.completions[0])
    assert actual.phases[0].requests[-1].completions[0].finish_reason == "length"
