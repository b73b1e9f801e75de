"""What is learnt from steps, and when two batches are taken to be faster than one."""

import pytest

from vllm_lamina.compat.outputs import StepTimes
from vllm_lamina.scheduler.costs import ENOUGH_STEPS, StepCosts


def learnt(
    fixed: float, per_request: float, per_token: float, sizes: list[int], context: int = 1000
) -> StepCosts:
    costs = StepCosts()
    for size in sizes * ENOUGH_STEPS:
        costs.observe(size, size * context, StepTimes(fixed + per_request * size, per_token * size * context))
    return costs


def test_steps_of_several_sizes_are_told_apart() -> None:
    costs = learnt(fixed=10.0, per_request=0.5, per_token=2e-3, sizes=[4, 8, 16])
    assert costs.model_seconds(2) == pytest.approx(11.0)
    assert costs.model_seconds(32) == pytest.approx(26.0)
    assert costs.attention_seconds(500) == pytest.approx(1.0)


def test_steps_of_one_size_count_as_fixed() -> None:
    costs = learnt(fixed=10.0, per_request=0.5, per_token=2e-3, sizes=[8])
    assert costs.model_seconds(4) == costs.model_seconds(16) == pytest.approx(14.0)


@pytest.mark.parametrize(
    ("fixed", "attention", "gain"),
    [
        (10.0, 0.0, 0.5),  # nothing to overlap: half a batch costs as much as a whole one
        (
            10.0,
            10.0,
            1.0,
        ),  # both sides are busy in turns: a half takes 10 + 5, two of them 20 = one of 10 + 10
        (10.0, 30.0, 40 / 30),  # the attention worker is never idle
    ],
)
def test_gain_of_two_batches(fixed: float, attention: float, gain: float) -> None:
    costs = learnt(fixed, 0.0, attention / 8000, sizes=[8])
    assert costs.gain_of_two(8, 8000) == pytest.approx(gain)


def test_gain_is_twofold_where_both_sides_grow_with_the_batch() -> None:
    costs = learnt(fixed=0.0, per_request=1.0, per_token=1e-3, sizes=[4, 8])
    assert costs.gain_of_two(8, 8000) == pytest.approx(2.0)
