"""The search finds what is best, says when nothing is, and keeps to budget and latency objective."""

from dataclasses import replace

import pytest

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.devices import read_catalogue
from vllm_lamina.planner.model_configs import builtin_models
from vllm_lamina.planner.report import format_answer, network_need, verdict
from vllm_lamina.planner.search import Question, answer
from vllm_lamina.planner.traces import load_trace

CATALOGUE = read_catalogue()


def question(**changes) -> Question:  # type: ignore[no-untyped-def]
    base = Question(
        model=builtin_models()["llama-33b"],
        trace=load_trace("azure-conv").saturating(),
        devices=(CATALOGUE.device("h100"), CATALOGUE.device("h20")),
        catalogue=CATALOGUE,
        price_set="paper",
        requests=400,
        max_model_workers=2,
        max_attention_workers=4,
    )
    return replace(base, **changes)


def with_price(key: str, usd: float, **changes) -> Question:  # type: ignore[no-untyped-def]
    catalogue = CATALOGUE.with_price(key, usd)
    return question(
        catalogue=catalogue, devices=(catalogue.device("h100"), catalogue.device("h20")), **changes
    )


def test_cheap_memory_beside_a_device_that_cannot_hold_the_model_alone_is_used() -> None:
    # One kind of memory device that cannot compute, at a tenth of the price.
    slow = replace(CATALOGUE.device("h20"), flops=5e12)
    found = answer(question(devices=(CATALOGUE.device("h100"), slow)))
    yes, reasons = verdict(found)
    assert yes
    assert "h100+h20" in reasons[0]
    gain = found.gain(found.laminas[0])
    assert gain is not None
    assert gain > 1.1


def test_expensive_memory_devices_are_not_worth_it() -> None:
    found = answer(with_price("h20", 50.0, max_model_workers=4, max_attention_workers=2))
    yes, reasons = verdict(found)
    assert not yes
    assert len(reasons) > 1
    assert "DO NOT DISAGGREGATE" in format_answer(found, "llama-33b")


def test_ranking_is_by_tokens_per_dollar_and_gains_refer_to_the_best_baseline() -> None:
    found = answer(question())
    scores = [candidate.tokens_per_dollar for candidate in found.ranked]
    assert scores == sorted(scores, reverse=True)
    assert found.gain(found.baselines[0]) == 1.0
    for candidate in found.ranked:
        assert candidate.result is not None
        assert candidate.result.throughput <= candidate.estimate.batch / candidate.estimate.tbt * 1.1


def test_budget_buys_copies() -> None:
    found = answer(question(budget=45.0))
    for candidate in found.ranked:
        assert candidate.copies * candidate.cost <= 45.0
        assert (candidate.copies + 1) * candidate.cost > 45.0
    throughputs = [candidate.throughput for candidate in found.ranked]
    assert throughputs == sorted(throughputs, reverse=True)


def test_a_rate_is_served_by_as_many_engines_as_it_takes() -> None:
    found = answer(question(rate=60.0))
    costs = [candidate.total_cost for candidate in found.ranked]
    assert costs == sorted(costs)
    for candidate in found.ranked:
        need = 60.0 * found.question.trace.outputs.mean()
        assert candidate.throughput >= need
        one_less = candidate.throughput * (candidate.copies - 1) / candidate.copies
        assert one_less < need / 0.9
        # A little below saturation a queue forms now and then, but it does not grow.
        assert candidate.served.ttft.p50 < 1.0
    assert "TTFT" in format_answer(found, "llama-33b")
    with pytest.raises(ConfigError, match=r"serves 60 requests per second for 30.00 USD per hour"):
        answer(question(rate=60.0, budget=30.0))


def test_latency_objective_is_met() -> None:
    found = answer(question(tbt_slo=0.035))
    assert found.ranked
    for candidate in found.ranked:
        assert candidate.result is not None
        assert candidate.result.tbt.p99 <= 0.035


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 1.0}, "costs more than the budget of 1.00 USD per hour"),
        ({"tbt_slo": 0.001}, "time between tokens is above 1 ms even for one request"),
        ({"model": builtin_models()["llama3-70b"], "max_model_workers": 1}, r"141.1 GB\) do not fit"),
    ],
)
def test_impossible_questions_say_what_stands_in_the_way(changes, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        answer(question(**changes))


def test_network_need_by_hand() -> None:
    found = answer(question())
    best, model = found.laminas[0], found.question.model
    rate = best.estimate.throughput * (model.query_bytes_per_token + model.kv_bytes_per_token) * 8 / 1e9
    nics = min(count for _, count in best.deployment.device_counts())
    assert network_need(best) == pytest.approx(rate / nics)
    assert network_need(found.baselines[0]) == 0.0
