"""bfloat16 and float16: Lamina stays as near to stock vLLM as rounding allows."""

from __future__ import annotations

import pytest
from comparison import Rounding, assert_close_to
from engines import Engines
from jobs import Job, Phase
from models import ModelZoo
from workloads import EDGE_LENGTHS, requests

# For this model, stock vLLM's log-probabilities in bfloat16 are up to 0.13 from its own in float32, and in float16
# up to 0.02. Lamina may be as far from stock as stock is from exact.
ROUNDING = {
    "bfloat16": Rounding(logprob_tolerance=0.15, margin=0.3),
    "float16": Rounding(logprob_tolerance=0.02, margin=0.04),
}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_close_to_stock(engines: Engines, model_zoo: ModelZoo, dtype: str) -> None:
    prompts = requests((*EDGE_LENGTHS, 600))
    phases = [Phase("cold", prompts), Phase("warm", prompts)]
    stock, lamina = engines.pair(Job(model_zoo("llama"), phases, {"dtype": dtype}))
    assert_close_to(stock, lamina, ROUNDING[dtype])
