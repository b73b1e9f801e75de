"""The reproduction of the paper's figures stays where docs/planner.md says it is."""

import sys
from pathlib import Path

import numpy as np
import pytest
from planner_examples import MODEL

from vllm_lamina.planner.deployment import baseline, lamina
from vllm_lamina.planner.simulator import simulate
from vllm_lamina.planner.traces import load_trace

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
paper_model = pytest.importorskip("paper_model")


def test_minimum_bandwidth_by_hand() -> None:
    found = paper_model.minimum_bandwidth(MODEL, 100, 0.2, 0.3, slack=0.1)
    assert found == pytest.approx(100 * 60_000 / 0.05)


def test_least_bandwidth_is_under_30_gb_per_second() -> None:
    batches = np.arange(1.0, 301.0)
    assert paper_model.least_bandwidth(batches, 4096).max() < 30
    assert paper_model.shortest_context(1024, 20.0) < 6144


@pytest.mark.parametrize(("model", "paper"), [("llama-65b", 0.132), ("llama3-70b", 0.035)])
def test_sending_q_early_gains_about_what_the_paper_says(model: str, paper: float) -> None:
    best = max(float(paper_model.overlap_gain(model, context)[1].max()) for context in (1024, 4096))
    assert best == pytest.approx(paper, rel=0.15)


def test_equal_cost_batch_and_gain() -> None:
    model, catalogue = paper_model.MODELS["llama-65b"], paper_model.CATALOGUE
    requests = load_trace("azure-conv").saturating().head(2500)
    alone = simulate(baseline(model, paper_model.H100, 4, catalogue), requests)
    split = simulate(lamina(model, paper_model.H100, paper_model.H20, (2, 4), catalogue), requests)
    assert split.mean_batch / alone.mean_batch == pytest.approx(2.39, rel=0.15)
    assert 1.161 < split.throughput / alone.throughput < 1.901


def test_sensitivities_contain_the_default() -> None:
    spans = paper_model.sensitivity()
    assert spans[0][1] < 1.0 < spans[0][2]
    # Whatever slows vLLM alone raises every gain.
    assert spans[-1][1] > spans[0][1]
    assert spans[-1][2] > spans[0][2]
