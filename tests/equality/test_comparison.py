"""The comparison accepts what rounding explains, and nothing else."""

from __future__ import annotations

import pytest
from comparison import Rounding, assert_close_to, assert_same, assert_same_until_aborted
from jobs import Completion, JobResult, PhaseResult, RequestResult

ROUNDING = Rounding(logprob_tolerance=0.1, margin=0.3)


def _result(tokens: list[int], logprobs: list[dict[int, float]]) -> JobResult:
    completion = Completion(tokens, logprobs, text="", finish_reason="length")
    return JobResult("", [PhaseResult("only", [RequestResult([completion], [])], 0, 0, [])])


STOCK = _result([7, 8], [{7: -1.0, 9: -1.2}, {8: -1.0, 9: -4.0}])


def test_same() -> None:
    assert_same(STOCK, _result([7, 8], [{7: -1.00005, 9: -1.2}, {8: -1.0, 3: -4.0}]))


def test_a_tie_of_stock_may_fall_either_way() -> None:
    tie = _result([7, 8, 3], [{7: -1.0, 9: -1.2}, {8: -1.0, 9: -1.00001}, {3: -1.0, 4: -2.0}])
    assert_same(tie, _result([7, 9, 5], [{7: -1.0, 9: -1.2}, {9: -1.0, 8: -1.0}, {5: -0.5, 4: -2.0}]))
    with pytest.raises(AssertionError):
        assert_same(tie, _result([6, 9, 5], [{6: -1.0, 7: -1.2}, {9: -1.0, 8: -1.0}, {5: -0.5, 4: -2.0}]))


@pytest.mark.parametrize(
    "other",
    [
        _result([7, 9], [{7: -1.0, 9: -1.2}, {8: -1.0, 9: -1.0}]),  # another token
        _result([7], [{7: -1.0, 9: -1.2}]),  # one token fewer
        _result([7, 8], [{7: -1.001, 9: -1.2}, {8: -1.0, 9: -4.0}]),  # another log-probability
        _result([7, 8], [{5: -1.0, 6: -1.2}, {8: -1.0, 9: -4.0}]),  # other likeliest tokens
    ],
)
def test_not_same(other: JobResult) -> None:
    with pytest.raises(AssertionError):
        assert_same(STOCK, other)


def test_the_same_until_aborted() -> None:
    stock = Completion([7, 8, 3], [{7: -1.0, 9: -1.2}, {8: -1.0, 9: -1.00001}, {3: -1.0, 4: -2.0}], "", None)
    assert_same_until_aborted(stock, Completion([7], [{7: -1.0, 9: -1.2}], "", None))
    assert_same_until_aborted(stock, Completion([7, 9], [{7: -1.0, 9: -1.2}, {9: -1.0, 8: -1.0}], "", None))
    for token, logprob in ((9, -1.2), (7, -1.1)):
        with pytest.raises(AssertionError):
            assert_same_until_aborted(stock, Completion([token], [{token: logprob}], "", None))


def test_close_until_a_near_tie() -> None:
    assert_close_to(STOCK, _result([9, 5], [{9: -1.1, 7: -1.1}, {5: -0.1, 6: -3.0}]), ROUNDING)


@pytest.mark.parametrize(
    "other",
    [
        _result([7, 9], [{7: -1.0, 9: -1.2}, {9: -1.0, 8: -4.0}]),  # diverges where stock was sure
        _result([7, 8], [{7: -1.2, 9: -1.2}, {8: -1.0, 9: -4.0}]),  # too far before any divergence
        _result([7], [{7: -1.0, 9: -1.2}]),  # ends early
    ],
)
def test_not_close(other: JobResult) -> None:
    with pytest.raises(AssertionError):
        assert_close_to(STOCK, other, ROUNDING)
