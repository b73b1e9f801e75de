"""Under storms every request is answered, with the tokens of an undisturbed run, and nothing is left behind.

For longer, and for other layouts: `python -m tests.chaos --help`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_questions import make_questions
from chaos_run import run
from engines import Engines
from layouts import Layout
from models import ModelZoo
from questions import Question

SECONDS = 10.0
NUM_QUESTIONS = 60


@pytest.fixture(scope="module")
def questions(engines: Engines, model_zoo: ModelZoo) -> list[Question]:
    return make_questions(engines, model_zoo("four_kv_heads"), NUM_QUESTIONS)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("layout", "seed"), [pytest.param("embedded", 1, marks=pytest.mark.slow), ("sequence@hosts", 2)]
)
def test_short_run(
    model_zoo: ModelZoo, questions: list[Question], tmp_path: Path, layout: str, seed: int
) -> None:
    outcome = run(Layout.parse(layout), seed, SECONDS, model_zoo("four_kv_heads"), questions, tmp_path)
    print(outcome.summary())
    assert not outcome.failures, outcome.summary()
    assert outcome.kinds["kill"] + outcome.kinds["pause"] > 0
