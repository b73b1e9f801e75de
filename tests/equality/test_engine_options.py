"""Engine options that change how batches are made and where tokens are kept do not change what is generated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase, Request
from models import ModelZoo
from workloads import EDGE_LENGTHS, greedy, prompt, requests, sampled


@pytest.mark.parametrize(
    ("model", "engine"),
    [
        # Chunked prefill: prompts are cut into chunks no longer than the budget, mixed with decodes.
        ("llama", {"max_num_batched_tokens": 64}),
        ("qwen3", {"max_num_batched_tokens": 100, "block_size": 64}),
        ("llama", {"enable_prefix_caching": False, "max_num_seqs": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_option(engines: Engines, model_zoo: ModelZoo, model: str, engine: dict[str, Any]) -> None:
    shared = prompt(150, seed=9)
    prompts = requests((*EDGE_LENGTHS, 600)) + [
        Request(shared + prompt(i, seed=i), greedy(12)) for i in (1, 5, 40)
    ]
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    assert_same(*engines.pair(Job(model_zoo(model), phases, engine)))


def test_preemption(engines: Engines, model_zoo: ModelZoo) -> None:
    """A KV pool too small for all requests: some are preempted and computed again, with the same tokens."""
    phases = [Phase("crowded", [Request(prompt(20 + 9 * i, seed=i), greedy(150)) for i in range(12)])]
    job = Job(model_zoo("llama"), phases, {"max_model_len": 512, "block_size": 32}, kv_memory_mib=1)
    stock, lamina = engines.pair(job)
    assert_same(stock, lamina)
    assert stock.phase("crowded").preemptions > 0
    assert lamina.phase("crowded").preemptions > 0


def test_seeds_of_prompts_in_chunks(engines: Engines, model_zoo: ModelZoo) -> None:
    """Stock vLLM on the CPU serves them in one piece only; the random numbers are the same in several."""
    prompts = [Request(prompt(150 + i, seed=i), sampled(20, seed=i)) for i in range(4)]
    job = Job(model_zoo("llama"), [Phase("seeds", prompts)])
    stock = engines.run(job)
    for batches in (1, 2):
        engine = {"max_num_batched_tokens": 64, "lamina_batches": batches}
        assert_same(stock, engines.run(replace(job, executor="lamina", engine=engine)))
