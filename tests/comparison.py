"""Compares what Lamina generated with what stock vLLM generated.

In float32 stock vLLM agrees with itself whatever else is in the batch: tokens equal, log-probabilities within 3e-5. So
Lamina must give the same tokens, and log-probabilities within `FLOAT32_TOLERANCE`. Where the two likeliest tokens of
stock are nearer to each other than that (`FLOAT32_TIE`), either is right, and what follows has nothing to do with it.

In bfloat16 and float16 stock does not agree with itself. Rounding depends on the composition of the batch, and where
the two likeliest tokens are near each other the choice flips; from there on the texts have nothing to do with each
other. So reduced precision is compared up to the first divergence, which must be at such a near-tie of stock.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs import Completion, JobResult, PhaseResult

FLOAT32_TOLERANCE = 1e-4
FLOAT32_TIE = 3e-5


@dataclass(frozen=True)
class Rounding:
    """How far a reduced precision may be from stock: log-probabilities before the divergence, margin at it."""

    logprob_tolerance: float
    margin: float


def assert_same(stock: JobResult, lamina: JobResult, tolerance: float = FLOAT32_TOLERANCE) -> None:
    """Every sequence of every phase has the same tokens, text and end, and nearly the same log-probabilities."""
    assert [phase.name for phase in stock.phases] == [phase.name for phase in lamina.phases]
    for ours, theirs in zip(lamina.phases, stock.phases, strict=True):
        assert_same_phase(theirs, ours, tolerance)


def assert_same_phase(stock: PhaseResult, lamina: PhaseResult, tolerance: float = FLOAT32_TOLERANCE) -> None:
    for index, (theirs, ours) in enumerate(zip(stock.requests, lamina.requests, strict=True)):
        where = f"phase {stock.name!r}, request {index}"
        assert len(theirs.completions) == len(ours.completions), where
        assert_close(theirs.prompt_logprobs, ours.prompt_logprobs, tolerance, f"{where}, prompt")
        for expected, actual in zip(theirs.completions, ours.completions, strict=True):
            divergence = first_divergence(expected, actual)
            if divergence is not None:
                assert margin(expected, divergence) < FLOAT32_TIE, (
                    f"{where}: {describe(expected, actual, divergence)}"
                )
                same = slice(divergence)
                assert_close(expected.logprobs[same], actual.logprobs[same], tolerance, where)
                continue
            assert expected.text == actual.text, where
            assert expected.finish_reason == actual.finish_reason, where
            assert_close(expected.logprobs, actual.logprobs, tolerance, where)


def assert_same_until_aborted(
    stock: Completion, lamina: Completion, tolerance: float = FLOAT32_TOLERANCE
) -> None:
    """The tokens before an abort are the same, up to a near-tie; how many there are depends on timing."""
    length = min(len(stock.token_ids), len(lamina.token_ids))
    divergence = first_divergence(stock, lamina)
    if divergence is not None and divergence < length:
        assert margin(stock, divergence) < FLOAT32_TIE, f"aborted: {describe(stock, lamina, divergence)}"
        length = divergence
    assert_close(stock.logprobs[:length], lamina.logprobs[:length], tolerance, "aborted request")


def assert_close_to(stock: JobResult, lamina: JobResult, rounding: Rounding) -> None:
    """Reduced precision: see the module's docstring."""
    for theirs, ours in zip(stock.phases, lamina.phases, strict=True):
        for index, (expected, actual) in enumerate(zip(theirs.requests, ours.requests, strict=True)):
            where = f"phase {theirs.name!r}, request {index}"
            for one, other in zip(expected.completions, actual.completions, strict=True):
                _assert_close_completion(one, other, rounding, where)


def _assert_close_completion(stock: Completion, lamina: Completion, rounding: Rounding, where: str) -> None:
    divergence = first_divergence(stock, lamina)
    end = len(stock.token_ids) if divergence is None else divergence
    assert_close(stock.logprobs[:end], lamina.logprobs[:end], rounding.logprob_tolerance, where)
    if divergence is not None:
        assert margin(stock, divergence) < rounding.margin, f"{where}: {describe(stock, lamina, divergence)}"


def first_divergence(stock: Completion, lamina: Completion) -> int | None:
    """The first position whose tokens differ, or where only one has a token; None if there is none."""
    for position, (expected, actual) in enumerate(zip(stock.token_ids, lamina.token_ids, strict=False)):
        if expected != actual:
            return position
    if len(stock.token_ids) != len(lamina.token_ids):
        return min(len(stock.token_ids), len(lamina.token_ids))
    return None


def margin(completion: Completion, position: int) -> float:
    """By how much the likeliest token leads the second; infinite past the end."""
    if position >= len(completion.logprobs):
        return float("inf")
    first, second = sorted(completion.logprobs[position].values(), reverse=True)[:2]
    return first - second


def describe(stock: Completion, lamina: Completion, position: int) -> str:
    return (
        f"tokens differ at output position {position}: stock {stock.token_ids[position : position + 4]}, "
        f"Lamina {lamina.token_ids[position : position + 4]}, stock's margin there {margin(stock, position):.2g}"
    )


def assert_close(
    stock: list[dict[int, float]], lamina: list[dict[int, float]], tolerance: float, where: str
) -> None:
    """At each position the tokens that both list have log-probabilities within the tolerance.

    Which token comes last in a list of the likeliest may differ by a near-tie, so lists need not be equal.
    """
    assert len(stock) == len(lamina), (
        f"{where}: {len(stock)} and {len(lamina)} positions have log-probabilities"
    )
    for position, (expected, actual) in enumerate(zip(stock, lamina, strict=True)):
        common = expected.keys() & actual.keys()
        assert common or not (expected or actual), f"{where}, position {position}: no common token"
        for token in common:
            # A forbidden token's is minus infinity.
            same = expected[token] == actual[token]
            assert same or abs(expected[token] - actual[token]) <= tolerance, (
                f"{where}, position {position}, token {token}: log-probability {actual[token]:.6f}, "
                f"stock {expected[token]:.6f}"
            )
