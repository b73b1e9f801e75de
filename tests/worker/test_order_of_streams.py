"""The rule that replaces the lanes' turns on streams, in a model of it: every interleaving of lanes, proxy and worker.

What must hold: when the attention worker serves a layer of a step, it has served that layer of every step that was
announced before. And nobody waits in a circle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

PLACES = 2
"""For frames of a lane."""


@dataclass(frozen=True)
class Step:
    """A step that was announced: layers packed by its stream, sent by the proxy, served by the attention worker."""

    lane: int
    answered: bool
    packed: int = 0
    sent: int = 0
    served: int = 0


@dataclass(frozen=True)
class State:
    """Steps in the order in which they were announced, frames in the channel, and the steps that are to come."""

    steps: tuple[Step, ...]
    channel: tuple[tuple[int, int], ...]
    """(step, layer), the oldest first."""
    to_come: tuple[tuple[bool, ...], ...]
    """Of each lane: whether each further step's layers are answered."""


Rule = Callable[[State, int, int], bool]


def earlier_steps_have_sent_it(state: State, number: int, num_layers: int) -> bool:
    """The rule of `streamed_exchange.h`. A step that is over has sent all."""
    return all(step.sent > state.steps[number].sent for step in state.steps[:number])


def no_rule(state: State, number: int, num_layers: int) -> bool:
    return True


def earlier_steps_are_over(state: State, number: int, num_layers: int) -> bool:
    """Right, but no two steps are in flight."""
    return all(step.served == num_layers for step in state.steps[:number])


def each_waits_for_all_others(state: State, number: int, num_layers: int) -> bool:
    return all(step.sent > state.steps[number].sent for step in state.steps if step != state.steps[number])


def is_over(step: Step, num_layers: int) -> bool:
    return (step.served if step.answered else step.sent) == num_layers


def moves(state: State, rule: Rule, num_layers: int) -> Iterator[State]:
    """What may happen next."""
    for lane, further in enumerate(state.to_come):
        if further and all(is_over(step, num_layers) for step in state.steps if step.lane == lane):
            to_come = tuple(steps[1:] if i == lane else steps for i, steps in enumerate(state.to_come))
            yield replace(state, steps=(*state.steps, Step(lane, further[0])), to_come=to_come)
    for number, step in enumerate(state.steps):
        in_flight = sum(state.steps[frame[0]].lane == step.lane for frame in state.channel)
        has_place = step.packed - step.sent + in_flight < PLACES
        has_answer = not step.answered or step.served == step.packed
        if step.packed < num_layers and has_place and has_answer:
            yield with_step(state, number, replace(step, packed=step.packed + 1))
        if step.sent < step.packed and rule(state, number, num_layers):
            sent = with_step(state, number, replace(step, sent=step.sent + 1))
            yield replace(sent, channel=(*sent.channel, (number, step.sent)))
    if state.channel:
        number, layer = state.channel[0]
        served = with_step(state, number, replace(state.steps[number], served=layer + 1))
        yield replace(served, channel=state.channel[1:])


def with_step(state: State, number: int, step: Step) -> State:
    return replace(state, steps=(*state.steps[:number], step, *state.steps[number + 1 :]))


def explore(rule: Rule, to_come: tuple[tuple[bool, ...], ...], num_layers: int = 2) -> tuple[set[str], int]:
    """Faults that can be reached, and the number of states in which two steps are in flight."""
    begin = State((), (), to_come)
    seen, open_states, faults, overlaps = {begin}, [begin], set(), 0
    while open_states:
        state = open_states.pop()
        overlaps += sum(step.sent > 0 and not is_over(step, num_layers) for step in state.steps) > 1
        if state.channel:
            number, layer = state.channel[0]
            if any(step.served <= layer for step in state.steps[:number]):
                faults.add("a layer is served before an earlier step's")
        following = list(moves(state, rule, num_layers))
        done = not any(state.to_come) and all(is_over(step, num_layers) for step in state.steps)
        if not following and not done:
            faults.add("nobody can go on")
        for other in following:
            if other not in seen:
                seen.add(other)
                open_states.append(other)
    return faults, overlaps


@pytest.mark.parametrize(
    "to_come",
    [
        ((True, True), (True, True)),
        ((False, True), (False, True)),
        ((False, False, True), (True, False)),
        ((True,), (False,), (True,)),
    ],
)
def test_every_interleaving(to_come: tuple[tuple[bool, ...], ...]) -> None:
    faults, overlaps = explore(earlier_steps_have_sent_it, to_come)
    assert not faults
    assert overlaps > 0
    assert explore(earlier_steps_are_over, to_come)[1] == 0
    assert explore(no_rule, to_come)[0] == {"a layer is served before an earlier step's"}
    assert "nobody can go on" in explore(each_waits_for_all_others, to_come)[0]
