"""Which lane a request belongs to, how many lanes there are and whose turn it is, without a scheduler."""

from __future__ import annotations

import pytest

from vllm_lamina.compat.outputs import StepTimes
from vllm_lamina.scheduler.costs import ENOUGH_STEPS
from vllm_lamina.scheduler.lanes import Lanes

EQUAL = {f"r{i}": 100 for i in range(8)}


def members(lanes: Lanes) -> list[int]:
    return [len(lane.members) for lane in lanes.lanes]


@pytest.mark.parametrize(
    ("before", "after"),
    [((32, 0), (16, 16)), ((18, 14), (16, 16)), ((9, 7), (8, 8)), ((9, 8), (9, 8)), ((33, 31), (33, 31))],
)
def test_requests_move_until_the_lanes_are_even(before: tuple[int, int], after: tuple[int, int]) -> None:
    """Of equal requests; but not for a difference that costs less than it would to move them."""
    lanes = Lanes(2, may_move=True)
    loads = {f"{lane}-{i}": 100 for lane, count in enumerate(before) for i in range(count)}
    for request_id in loads:
        lanes.assign(request_id, int(request_id[0]))
    lanes.spread(loads)
    assert members(lanes) == list(after)


def test_a_request_does_not_leave_a_lane_in_flight() -> None:
    lanes = Lanes(2, may_move=True, always=True)
    lanes.plan({}, [100] * 8, EQUAL)
    lanes.begin_step(0, EQUAL, set())
    lanes.plan(EQUAL, [], EQUAL)
    assert members(lanes) == [8, 0]
    lanes.end_step(0)
    lanes.plan(EQUAL, [], EQUAL)
    assert members(lanes) == [4, 4]


def test_who_runs_no_more_is_forgotten() -> None:
    lanes = Lanes(2, may_move=True, always=True)
    lanes.begin_step(0, EQUAL, set())
    assert lanes.num_busy(["r0"]) == 1
    assert lanes.num_busy(["gone"]) == lanes.num_busy([]) == 0
    lanes.plan({"r0": 100, "r1": 100}, [], EQUAL)
    assert lanes.members(0) == {"r0", "r1"}


def test_idle_lanes_take_turns() -> None:
    lanes = Lanes(2, may_move=True, always=True)
    lanes.plan({}, [100, 100], "ab")
    assert lanes.next_idle(None) is None, "nothing to do"
    assert lanes.next_idle("a") == 0
    lanes.begin_step(0, ["a"], set())
    assert lanes.next_idle("x") == 1
    assert lanes.next_idle(None) is None, "lane 1 is empty, lane 0 in flight"
    lanes.begin_step(1, ["b"], set())
    assert lanes.next_idle("x") is None
    lanes.end_step(1)
    lanes.end_step(0)
    assert [lanes.next_idle(None) for _ in range(4)] == [0, 1, 0, 1]


def test_adapters_of_steps_in_flight() -> None:
    lanes = Lanes(2, may_move=True)
    lanes.begin_step(0, ["a"], {1, 2})
    lanes.begin_step(1, ["b"], {3})
    assert lanes.adapters_in_flight() == {1, 2, 3}
    lanes.end_step(0)
    assert lanes.adapters_in_flight() == {3}


def test_one_lane_has_everybody_and_is_never_full() -> None:
    lanes = Lanes(1, may_move=True, always=True)
    lanes.plan({}, [100] * 8, EQUAL)
    assert lanes.next_idle("x") == 0
    assert not lanes.is_full(0, [100] * 8, 100)
    lanes.begin_step(0, EQUAL, set())
    lanes.end_step(0)
    lanes.plan(EQUAL, [100] * 8, EQUAL)
    assert lanes.members(0) == EQUAL.keys()
    assert not lanes.is_full(0, [100] * 8, 100)


def test_when_a_lane_is_full() -> None:
    lanes = Lanes(2, may_move=True, always=True)
    lanes.begin_step(0, ["a"], set())
    lanes.begin_step(1, ["b", "c"], set())
    lanes.plan(
        {"a": 372, "b": 72, "c": 72}, [172] * 4, "abc"
    )  # loads of 500, 200 twice and 300: 2100 of 7 requests
    assert not lanes.is_full(0, [372, 172], 172), "a half of the next one is within the half of the load"
    assert lanes.is_full(0, [372, 172, 172], 172)
    assert not lanes.is_full(0, [372], 928)
    assert lanes.is_full(0, [372], 1000), "it belongs into the lane that has less"
    assert lanes.is_full(0, [0] * 4, 0), "by the number of requests"
    assert not lanes.is_full(0, [0] * 3, 0)
    assert not lanes.is_full(1, [72, 72], 5000), "the lane is the lighter one"


def learnt(attention_per_token: float, may_move: bool = True) -> Lanes:
    lanes = Lanes(2, may_move=may_move)
    scheduled = dict.fromkeys(EQUAL, 1)
    for _ in range(ENOUGH_STEPS if may_move else 2 * ENOUGH_STEPS):
        lanes.learn(scheduled, EQUAL.__getitem__, StepTimes(1.0, attention_per_token * sum(EQUAL.values())))
    return lanes


@pytest.mark.parametrize(
    ("attention_per_token", "expected"),
    [pytest.param(1e-5, [8, 0], id="cheap"), pytest.param(2e-3, [4, 4], id="as long as the model")],
)
def test_two_lanes_where_two_halves_are_faster(attention_per_token: float, expected: list[int]) -> None:
    lanes = learnt(attention_per_token)
    lanes.plan(EQUAL, [], EQUAL)
    for name in EQUAL:
        lanes.assign(name, 0)
    lanes.plan(EQUAL, [], EQUAL)
    assert members(lanes) == expected


def test_one_lane_as_long_as_nothing_is_known_and_for_one_request() -> None:
    unknown = Lanes(2, may_move=True)
    unknown.begin_step(0, EQUAL, set())
    unknown.end_step(0)
    unknown.plan(EQUAL, [], EQUAL)
    assert members(unknown) == [8, 0]
    alone = Lanes(2, may_move=True, always=True)
    alone.begin_step(1, ["a"], set())
    alone.end_step(1)
    alone.plan({"a": 100}, [], "a")
    assert members(alone) == [1, 0], "it moves to the lane that is left"


def staying(always: bool = True) -> Lanes:
    return Lanes(2, may_move=False, always=always)


def run(lanes: Lanes, index: int, *names: str) -> None:
    lanes.begin_step(index, names, set())
    lanes.end_step(index)


def test_a_request_keeps_its_lane_until_it_is_gone() -> None:
    lanes = staying()
    run(lanes, 1, "a")
    lanes.plan({"a": 100}, [], "a")
    assert lanes.members(1) == {"a"}, "alone as it is"
    lanes.plan({}, [100], "a")
    assert lanes.members(1) == set(), "it does not run"
    assert lanes.home("a") == 1
    assert lanes.next_idle("a") == 1
    with pytest.raises(AssertionError, match="request a of lane 1 was scheduled in lane 0"):
        lanes.begin_step(0, ["a"], set())
    lanes.plan({}, [], "")
    assert lanes.home("a") is None


@pytest.mark.parametrize("may_move", [False, True])
def test_nobody_leaves_a_step_in_flight(may_move: bool) -> None:
    """Also a request that is gone, whose name comes back, and one that was preempted meanwhile."""
    lanes = Lanes(2, may_move=may_move, always=True)
    lanes.begin_step(1, ["a", "b"], set())
    lanes.plan({}, [100], "a")
    assert lanes.home("a") == lanes.home("b") == 1
    assert lanes.next_idle("a") is None
    lanes.end_step(1)
    lanes.plan({}, [100], "a")
    assert lanes.home("a") == (None if may_move else 1)
    assert lanes.home("b") is None


def test_new_requests_enter_the_lane_that_has_most_where_one_is_wanted() -> None:
    lanes = learnt(attention_per_token=1e-5, may_move=False)
    run(lanes, 0, "a")
    run(lanes, 1, "b", "c")
    lanes.plan(dict.fromkeys("abc", 100), [100], "abcd")
    assert members(lanes) == [1, 2]
    assert lanes.is_full(0, [100], 100)
    assert not lanes.is_full(1, [100, 100], 100)
    lanes.plan(dict.fromkeys("bc", 100), [100], "bcd")
    assert [lanes.next_idle("d") for _ in range(2)] == [1, 1], "lane 0 has drained"


def test_new_requests_enter_the_lighter_lane_where_two_are_wanted() -> None:
    lanes = learnt(attention_per_token=2e-3, may_move=False)
    run(lanes, 0, *EQUAL)
    lanes.plan(EQUAL, [100], EQUAL)
    assert members(lanes) == [8, 0]
    assert lanes.is_full(0, list(EQUAL.values()), 100)
    assert not lanes.is_full(1, [], 100)


def test_a_part_of_the_first_requests_shows_what_steps_cost() -> None:
    """First a quarter of them, then a half, in one lane."""
    lanes = staying(always=False)
    admitted: dict[str, int] = {}
    for expected in (2, 4):
        lanes.plan(admitted, [100] * (8 - len(admitted)), EQUAL)
        assert lanes.is_full(1, [], 100)
        while not lanes.is_full(0, list(admitted.values()), 100):
            admitted[f"r{len(admitted)}"] = 100
        assert len(admitted) == expected
        run(lanes, 0, *admitted)
        for _ in range(ENOUGH_STEPS):
            lanes.learn(dict.fromkeys(admitted, 1), EQUAL.__getitem__, StepTimes(1.0, 0.01 * len(admitted)))
    lanes.plan(admitted, [100] * 4, EQUAL)
    assert not lanes.is_full(0, [100] * 8, 100), "one batch is faster"


def test_a_step_that_prefills_teaches_nothing() -> None:
    lanes = Lanes(2, may_move=True)
    for _ in range(ENOUGH_STEPS):
        lanes.learn({"a": 1, "b": 40}, lambda name: 100, StepTimes(1.0, 1.0))
    assert not lanes.costs.known
