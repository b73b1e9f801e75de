"""bfloat16 and float16: Lamina stays as near to stock vLLM as rounding allows."""

from __future__ import annotations

import pytest
from comparison import Rounding, assert_close_to
from engines import Engines
from jobs import Job, Phase
from models import ModelZoo
from workloads import EDGE_LENGTHS, requests


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        ("bfloat16", Rounding(logprob_tolerance=0.25, margin=0.3)),
        ("float16", Rounding(logprob_tolerance=0.05, margin=0.06)),
    ],
)
def test_close_to_stock(engines: Engines, model_zoo: ModelZoo, dtype: str, rounding: Rounding) -> None:
    prompts = requests((*EDGE_LENGTHS, 600))
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    stock, lamina = engines.pair(Job(model_zoo("llama"), phases, {"dtype": dtype}))
    assert_close_to(stock, lamina, rounding)
