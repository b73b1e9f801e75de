"""A model of two tensor-parallel ranks, each with attention workers of its own, gives the output of stock vLLM's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase, Request
from models import ModelZoo
from workloads import EDGE_LENGTHS, greedy, prompt, requests

PREFIX = prompt(300, seed=3)
PHASES = [
    Phase("edges", requests(EDGE_LENGTHS, max_tokens=20)),
    Phase("long", requests((900, 5, 64), max_tokens=12, seed=20)),
    Phase("shared prefix", [Request(PREFIX + prompt(i, seed=i), greedy(12)) for i in range(1, 6)]),
    Phase(
        "arrivals",
        [Request(prompt(40 * i + 1, seed=80 + i), greedy(16), after_step=3 * i) for i in range(6)],
    ),
]


@pytest.fixture(scope="module")
def job(model_zoo: ModelZoo) -> Job:
    engine = {"tensor_parallel_size": 2, "max_num_batched_tokens": 512, "block_size": 32}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    return Job(model_zoo("four_kv_heads"), PHASES, engine, environment=environment)


@pytest.mark.parametrize(
    ("options", "memory"),
    [
        ({}, ()),
        # Each rank's blocks on two workers; by heads see partition/test_engines_of_several_workers.py.
        pytest.param({"lamina_partition": "sequence"}, (64, 32, 64, 32), marks=pytest.mark.slow),
    ],
    ids=["two lanes", "sequence"],
)
def test_equal_to_stock(engines: Engines, job: Job, options: dict[str, Any], memory: tuple[int, ...]) -> None:
    stock = engines.run(job)
    lamina = engines.run(
        replace(job, executor="lamina", engine=job.engine | options, worker_memory_mib=memory)
    )
    assert lamina.executor == "LaminaExecutor"
    assert_same(stock, lamina)
