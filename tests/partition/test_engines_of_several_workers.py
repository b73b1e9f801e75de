"""Engines whose KV cache is divided over several attention workers give stock vLLM's output."""

from __future__ import annotations

from dataclasses import replace

import pytest
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase, Request
from models import ModelZoo
from workloads import EDGE_LENGTHS, greedy, prompt, requests

PREFIX = prompt(400, seed=7)

PHASES = [
    Phase("edges", requests(EDGE_LENGTHS, max_tokens=20)),
    # Prompts longer than the token budget, so that chunks attend their context; beside requests that decode.
    Phase("long", requests((1500, 5, 900, 64), max_tokens=12, seed=20)),
    # Within the same step one request attends over blocks that another one fills, possibly in the other lane.
    Phase("shared prefix", [Request(PREFIX + prompt(i, seed=i), greedy(12)) for i in range(1, 8)]),
    Phase("cached prefix", [Request(PREFIX + prompt(i, seed=50 + i), greedy(12)) for i in range(4)]),
    Phase(
        "arrivals",
        [Request(prompt(40 * i + 1, seed=80 + i), greedy(16), after_step=3 * i) for i in range(6)],
    ),
]

# Options of Lamina, and the workers' pools.
ENGINES: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {
    "head, 2 workers": ({"lamina_partition": "head"}, (64, 64)),
    "head, 3 workers, 4 heads": ({"lamina_partition": "head"}, (64, 64, 128)),
    "sequence, 2 workers, one lane": ({"lamina_partition": "sequence", "lamina_batches": 1}, (64, 64)),
    "sequence, 3 unequal workers": ({"lamina_partition": "sequence"}, (16, 32, 64)),
    "sequence, 4 workers": ({"lamina_partition": "sequence"}, (32, 32, 32, 32)),
    "request, 3 unequal workers": ({"lamina_partition": "request"}, (16, 32, 64)),
}


@pytest.fixture(scope="module")
def job(model_zoo: ModelZoo) -> Job:
    engine = {"max_model_len": 2048, "max_num_batched_tokens": 512, "block_size": 32}
    return Job(model_zoo("four_kv_heads"), PHASES, engine)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "sequence, 4 workers")) for name in ENGINES],
)
def test_equal_to_stock(engines: Engines, job: Job, name: str) -> None:
    options, memory = ENGINES[name]
    stock = engines.run(job)
    lamina = engines.run(
        replace(job, executor="lamina", engine=job.engine | options, worker_memory_mib=memory)
    )
    assert "Lamina" in lamina.executor
    assert_same(stock, lamina)
    for phase in ("shared prefix", "cached prefix"):
        assert lamina.phase(phase).prefix_cache_hits == stock.phase(phase).prefix_cache_hits > 0
