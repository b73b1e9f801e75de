"""Which lane a request belongs to, how many lanes there are and whose turn it is, without a scheduler."""

from __future__ import annotations

import pytest

from vllm_lamina.compat.outputs import StepTimes
from vllm_lamina.scheduler.costs import ENOUGH_STEPS
from vllm_lamina.scheduler.lanes import TOKENS_PER_REQUEST, Lanes, Share

EQUAL = {f"r{i}": 100 for i in range(8)}


def members(lanes: Lanes) -> list[int]:
    return [len(lane.members) for lane in lanes.lanes]


@pytest.mark.parametrize(
    ("before", "after"),
    [((32, 0), (16, 16)), ((18, 14), (16, 16)), ((9, 7), (8, 8)), ((9, 8), (9, 8)), ((33, 31), (33, 31))],
)
def test_requests_move_until_the_lanes_are_even(before: tuple[int, int], after: tuple[int, int]) -> None:
    """Of equal requests; but not for a difference that costs less than it would to move them."""
    lanes = Lanes(2)
    loads = {f"{lane}-{i}": 100 for lane, count in enumerate(before) for i in range(count)}
    for request_id in loads:
        lanes.assign(request_id, int(request_id[0]))
    lanes.spread(loads)
    assert members(lanes) == list(after)


def test_a_request_does_not_leave_a_lane_in_flight() -> None:
    lanes = Lanes(2, always=True)
    lanes.plan({}, [100] * 8)
    lanes.begin_step(0, EQUAL, set())
    lanes.plan(EQUAL, [])
    assert members(lanes) == [8, 0]
    lanes.end_step(0)
    lanes.plan(EQUAL, [])
    assert members(lanes) == [4, 4]


def test_who_runs_no_more_is_forgotten() -> None:
    lanes = Lanes(2, always=True)
    lanes.begin_step(0, EQUAL, set())
    assert lanes.num_busy(["r0"]) == 1
    assert lanes.num_busy(["gone"]) == lanes.num_busy([]) == 0
    lanes.plan({"r0": 100, "r1": 100}, [])
    assert lanes.members(0) == {"r0", "r1"}


def test_idle_lanes_take_turns() -> None:
    lanes = Lanes(2, always=True)
    lanes.plan({}, [100, 100])
    assert lanes.next_idle(may_admit=False) is None, "nothing to do"
    assert lanes.next_idle(may_admit=True) == 0
    lanes.begin_step(0, ["a"], set())
    assert lanes.next_idle(may_admit=True) == 1
    assert lanes.next_idle(may_admit=False) is None, "lane 1 is empty, lane 0 in flight"
    lanes.begin_step(1, ["b"], set())
    assert lanes.next_idle(may_admit=True) is None
    lanes.end_step(1)
    lanes.end_step(0)
    assert [lanes.next_idle(may_admit=False) for _ in range(4)] == [0, 1, 0, 1]


def test_adapters_of_steps_in_flight() -> None:
    lanes = Lanes(2)
    lanes.begin_step(0, ["a"], {1, 2})
    lanes.begin_step(1, ["b"], {3})
    assert lanes.adapters_in_flight() == {1, 2, 3}
    lanes.end_step(0)
    assert lanes.adapters_in_flight() == {3}


def test_one_lane_has_everybody_and_no_share() -> None:
    lanes = Lanes(1, always=True)
    lanes.plan({}, [100] * 8)
    assert lanes.next_idle(may_admit=True) == 0
    assert lanes.share(0) is None
    lanes.begin_step(0, EQUAL, set())
    lanes.end_step(0)
    lanes.plan(EQUAL, [100] * 8)
    assert lanes.members(0) == EQUAL.keys()
    assert lanes.share(0) is None


def test_a_share_is_a_half_of_what_runs_and_may_run() -> None:
    lanes = Lanes(2, always=True)
    lanes.begin_step(0, ["a"], set())
    lanes.begin_step(1, ["b", "c"], set())
    lanes.plan({"a": 300, "b": 100, "c": 100}, [200, 200])
    load = (900 + 5 * TOKENS_PER_REQUEST) / 2
    assert lanes.share(0) == Share(load, 2.5, load_of_others=200 + 2 * TOKENS_PER_REQUEST)
    assert lanes.share(1) == Share(load, 2.5, load_of_others=300 + TOKENS_PER_REQUEST)
    assert lanes.share(None) is None


def test_when_a_share_is_reached() -> None:
    share = Share(load=1000, requests=3, load_of_others=500)
    assert share.is_reached([1000])
    assert share.is_reached([100] * 3), "by the number of requests"
    assert not share.is_reached([700]), "by neither"
    assert not share.is_reached([20] * 3), "the lane is the lighter one"


def learnt(attention_per_token: float) -> Lanes:
    lanes = Lanes(2)
    scheduled = dict.fromkeys(EQUAL, 1)
    for _ in range(ENOUGH_STEPS):
        lanes.learn(scheduled, EQUAL.__getitem__, StepTimes(1.0, attention_per_token * sum(EQUAL.values())))
    return lanes


@pytest.mark.parametrize(
    ("attention_per_token", "expected"),
    [pytest.param(1e-5, [8, 0], id="cheap"), pytest.param(2e-3, [4, 4], id="as long as the model")],
)
def test_two_lanes_where_two_halves_are_faster(attention_per_token: float, expected: list[int]) -> None:
    lanes = learnt(attention_per_token)
    lanes.plan(EQUAL, [])
    for name in EQUAL:
        lanes.assign(name, 0)
    lanes.plan(EQUAL, [])
    assert members(lanes) == expected


def test_one_lane_as_long_as_nothing_is_known_and_for_one_request() -> None:
    unknown = Lanes(2)
    unknown.begin_step(0, EQUAL, set())
    unknown.end_step(0)
    unknown.plan(EQUAL, [])
    assert members(unknown) == [8, 0]
    alone = Lanes(2, always=True)
    alone.begin_step(1, ["a"], set())
    alone.end_step(1)
    alone.plan({"a": 100}, [])
    assert members(alone) == [1, 0], "it moves to the lane that is left"


def test_a_step_that_prefills_teaches_nothing() -> None:
    lanes = Lanes(2)
    for _ in range(ENOUGH_STEPS):
        lanes.learn({"a": 1, "b": 40}, lambda name: 100, StepTimes(1.0, 1.0))
    assert not lanes.costs.known
