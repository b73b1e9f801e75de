"""A few seeds of the request fuzz, on both model runners; `python -m tests.request_fuzz` runs as many as wanted."""

from __future__ import annotations

import pytest
import runners
from engines import Engines
from models import ModelZoo

from fuzz import check, jobs, make_adapters


@pytest.fixture(scope="module")
def adapters(model_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_adapters(model_zoo("llama"), tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(
    ("runner", "seed", "number", "max_tokens"),
    [
        (runners.DEFAULT, 1, 60, 24),
        # Few and short: Triton's interpreter takes a hundredth of a second for each token.
        (runners.V2, 2, 14, 8),
    ],
)
def test_equal_to_stock(
    engines: Engines,
    model_zoo: ModelZoo,
    adapters: list[str],
    runner: str,
    seed: int,
    number: int,
    max_tokens: int,
) -> None:
    counts = check(engines, *jobs(seed, runner, number, max_tokens, model_zoo("llama"), adapters))
    assert counts["checked steps"] > 0
    assert number < 60 or counts["lane changes"] > 0
