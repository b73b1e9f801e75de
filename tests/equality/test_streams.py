"""Layers exchanged as on a GPU, on vLLM's V2 runner: kernels in Triton's interpreter, streams that threads execute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase, Request
from models import ModelZoo
from runners import V2
from workloads import greedy, prompt


def phases(prefix: list[int]) -> list[Phase]:
    return [
        Phase(
            "chunks, a prefix that is filled while it is hit, decodes",
            [
                Request(prompt(3), greedy(5)),
                Request([*prefix, 5], greedy(4, logprobs=2)),
                Request([*prefix, 9, 7], greedy(4)),
                Request([*prefix, 8, 6, 5], greedy(3), after_step=1),
                Request(prompt(30, seed=2), greedy(4), after_step=3),
            ],
        ),
        Phase(
            "the prefix is in the cache",
            [Request([*prefix, 4], greedy(3)), Request(prompt(20, seed=3), greedy(3))],
        ),
    ]


PREFIX = {
    "four_kv_heads": 40,
    "gpt_oss": 40,
    "gemma3": 40,
    "mistral_window": 40,
    "gemma4_shared": 72,
    "llama4": 150,
}
"""Of each model, how long: a block, or more than one of the larger ones, beyond a window or a chunk."""

ENGINES: dict[str, tuple[dict[str, Any], int]] = {
    "two lanes": ({}, 0),
    "one lane": ({"lamina_batches": 1}, 0),
    "head": ({"lamina_partition": "head"}, 2),
    "sequence": ({"lamina_partition": "sequence"}, 2),
}
"""Options of Lamina, and attention workers that run already."""


IN_EVERY_RUN = "gemma4_shared", "two lanes", True
"""Windows, two block sizes, unlike heads, shared KV; steps with a prefill chunk are eager there too."""
SLOW = {
    *(("four_kv_heads", name, graphs) for name in ENGINES for graphs in (False, True)),
    *((model, "two lanes", True) for model in PREFIX),
    *((model, name, True) for model in ("gpt_oss", "gemma4_shared") for name in ("head", "sequence")),
} - {IN_EVERY_RUN}


@pytest.mark.parametrize(
    ("model", "name", "graphs"),
    [IN_EVERY_RUN, *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(SLOW))],
)
def test_equal_to_stock(model_zoo: ModelZoo, engines: Engines, model: str, name: str, graphs: bool) -> None:
    options, num_workers = ENGINES[name]
    engine = {"max_num_batched_tokens": 32, "block_size": 32, "max_model_len": 256, "max_num_seqs": 8}
    stock = Job(model_zoo(model), phases(prompt(PREFIX[model])), engine, kv_memory_mib=16, runner=V2)
    lamina = replace(
        stock,
        executor="lamina",
        streams=True,
        graphs=graphs,
        engine=engine | options,
        worker_memory_mib=(16,) * num_workers,
    )
    expected, actual = engines.run(stock), engines.run(lamina)
    assert_same(expected, actual)
    assert actual.phases[1].prefix_cache_hits == expected.phases[1].prefix_cache_hits > 0
    assert actual.counts["layers on streams"] > 20
    replays = [actual.counts.get(f"replays of lane {lane}", 0) for lane in (0, 1)]
    assert [count > 3 for count in replays] == [graphs, graphs and "lamina_batches" not in options]
