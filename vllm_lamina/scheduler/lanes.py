"""Which request belongs to which lane: two disjoint batches of about the same load, or one where two would not pay."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from vllm_lamina.compat.outputs import StepTimes
from vllm_lamina.scheduler.costs import MARGIN, StepCosts

TOKENS_PER_REQUEST = 128
"""What a request costs beside its context, in tokens of context: its share of a step outside of attention."""

ALLOWED_IMBALANCE = 1 / 16
"""Part of the total load by which lanes may differ before requests move."""


@dataclass
class Lane:
    """One of the batches in flight."""

    members: set[str] = field(default_factory=set)
    """Running requests that this lane schedules."""
    in_flight: bool = False
    """A step of this lane is on the model worker."""
    adapters: set[int] = field(default_factory=set)
    """LoRA adapters that the step in flight needs."""


class Lanes:
    """Assigns running requests to lanes and keeps the lanes' loads together.

    A request is a member of at most one lane, and never leaves a lane whose step is in flight. Where requests may move,
    those of idle lanes do, as soon as the loads differ by too much. Where they may not, what the model worker keeps for
    a request is in one lane: that is its home from its first step on until it is gone, also while it is preempted or a
    session that waits for input. Balance then comes by admission alone: a new request enters the lane that lacks it.

    Load is counted in tokens: a request's context, which its attention reads, and `TOKENS_PER_REQUEST`. Where two
    halves would take longer than one batch, by what the steps so far have cost, one lane has them all, or gets all that
    are new while the other drains.

    Parameters
    ----------
    num_lanes
        Number of batches in flight.
    may_move
        Whether a request may run in any lane.
    always
        Use all lanes, whatever steps cost.
    """

    def __init__(self, num_lanes: int, *, may_move: bool, always: bool = False) -> None:
        self.lanes = [Lane() for _ in range(num_lanes)]
        self.costs = StepCosts()
        self._may_move = may_move
        self._always = always
        self._home: dict[str, int] = {}
        """The lane of each request that may run in no other."""
        self._in_use = 1
        """Lanes in use; the others are being emptied, or empty."""
        self._open: Sequence[int] = (0,)
        """Those that new requests may enter."""
        self._loads: Mapping[str, int] = {}
        self._num_shares = 1
        self._share_of_load, self._share_of_requests = 0.0, 0.0
        self._last = num_lanes - 1

    def plan(self, running: Mapping[str, int], next_to_run: Iterable[int], known: Container[str]) -> None:
        """Divide the running requests among the lanes, before a step is scheduled.

        Parameters
        ----------
        running
            Context tokens of each running request.
        next_to_run
            Those of each waiting one that may run soon.
        known
            Every request that is not gone.
        """
        self.keep_only(running)
        self._home = {
            name: index for name, index in self._home.items() if name in known or self.lanes[index].in_flight
        }
        if len(self.lanes) == 1:
            return
        self._loads = {name: request_load(tokens) for name, tokens in running.items()}
        expected = [*running.values(), *next_to_run]
        self._in_use = self._choose_number(expected)
        if self._may_move:
            if self._in_use == 1:
                self.gather()
            else:
                self.spread(self._loads)
        if self._in_use > 1:
            self._open = range(len(self.lanes))
        else:
            totals = self._totals(self._loads)
            self._open = (0 if self._may_move else totals.index(max(totals)),)
        self._num_shares = self._choose_shares(expected)
        self._share_of_load = sum(map(request_load, expected)) / self._num_shares
        self._share_of_requests = len(expected) / self._num_shares

    def _choose_number(self, expected: Sequence[int]) -> int:
        """How many lanes to use for requests of so many context tokens."""
        if len(expected) < 2:
            return 1
        if self._always:
            return len(self.lanes)
        if not (self.costs.known if self._may_move else self.costs.well_known):
            return 1
        gain = self.costs.gain_of_two(len(expected), sum(expected))
        if gain > 1 + MARGIN:
            return len(self.lanes)
        return 1 if gain < 1 - MARGIN else self._in_use

    def _choose_shares(self, expected: Sequence[int]) -> int:
        """Of how many shares a lane gets one.

        Who enters a lane stays there, where requests may not move. So as long as nothing is known one lane shows what
        steps cost, with a quarter of the requests and then a half, for costs are fitted to steps of several sizes. The
        others wait for these few steps, once in an engine's life.
        """
        if self._may_move or self._always or self.costs.well_known or len(expected) < 2:
            return self._in_use
        return len(self.lanes) if self.costs.known else 2 * len(self.lanes)

    def members(self, index: int | None) -> Set[str]:
        """The requests of a lane; none of no lane."""
        return self.lanes[index].members if index is not None else frozenset()

    def home(self, name: str) -> int | None:
        """The lane that a request runs in or not at all; None where any will do."""
        return self._home.get(name)

    def is_full(self, index: int, tokens: Sequence[int], next_tokens: int) -> bool:
        """Whether a new request must not enter a lane now.

        Parameters
        ----------
        index
            The lane.
        tokens
            Context tokens of each of its requests, those that it has just admitted included.
        next_tokens
            Context tokens of the new one.
        """
        if index not in self._open:
            return True
        if self._num_shares == 1:
            return False
        load = sum(map(request_load, tokens))
        if load <= sum(self._loads.values()) - self.load(index, self._loads):
            return False  # whatever is still admitted, the lighter lane may take
        # It comes nearer to its share by the new request if that is by a half within it.
        return (
            load + request_load(next_tokens) / 2 > self._share_of_load
            or len(tokens) >= self._share_of_requests
        )

    def next_idle(self, next_to_admit: str | None) -> int | None:
        """The lane to schedule next: of those that are idle and have something to do the one whose turn is longest ago.

        It has had its turn then, even if nothing of it can be scheduled, for want of blocks say: else the other lane,
        which could give some back, would never come. An empty lane has something to do if the request that is to be
        admitted next may enter.
        """
        if next_to_admit is None:
            may_admit: Sequence[int] = ()
        else:
            home = self.home(next_to_admit)
            may_admit = self._open if home is None else (home,)
        candidates = [
            index
            for index, lane in enumerate(self.lanes)
            if not lane.in_flight and (lane.members or index in may_admit)
        ]
        if not candidates:
            return None
        num_lanes = len(self.lanes)
        self._last = min(candidates, key=lambda index: (index - self._last - 1) % num_lanes)
        return self._last

    def begin_step(self, index: int, scheduled: Iterable[str], adapters: set[int]) -> None:
        """A step of a lane goes to the model worker, with requests that it has, or admits."""
        lane = self.lanes[index]
        for request_id in scheduled:
            if request_id not in lane.members:
                self.assign(request_id, index)
            home = self._home.setdefault(request_id, index)
            assert home == index, f"request {request_id} of lane {home} was scheduled in lane {index}"
        lane.in_flight = True
        lane.adapters = adapters

    def end_step(self, index: int) -> None:
        """The output of the lane's step has arrived."""
        self.lanes[index].in_flight = False
        self.lanes[index].adapters = set()
        if self._may_move:
            self._home = {name: home for name, home in self._home.items() if home != index}

    def learn(self, scheduled: Mapping[str, int], tokens_of: Callable[[str], int], times: StepTimes) -> None:
        """A step has ended that took so long; ``tokens_of`` says how many context tokens a request has now."""
        # A single lane has nothing to decide, and a step that prefills says little about those that decode.
        if len(self.lanes) > 1 and len(scheduled) == sum(scheduled.values()):
            self.costs.observe(len(scheduled), sum(map(tokens_of, scheduled)), times)

    def adapters_in_flight(self) -> set[int]:
        """LoRA adapters that steps in flight need."""
        return set().union(*(lane.adapters for lane in self.lanes))

    def num_busy(self, running: Sequence[str]) -> int:
        """Lanes that have some of these requests."""
        return sum(not lane.members.isdisjoint(running) for lane in self.lanes)

    def assign(self, request_id: str, index: int) -> None:
        """Make a request a member of one lane and of no other."""
        for lane in self.lanes:
            lane.members.discard(request_id)
        self.lanes[index].members.add(request_id)

    def keep_only(self, running: Iterable[str]) -> None:
        """Forget the requests that run no more."""
        for lane in self.lanes:
            lane.members.intersection_update(running)

    def load(self, index: int, loads: Mapping[str, int]) -> int:
        """Load of a lane, in tokens."""
        return sum(loads[request_id] for request_id in self.lanes[index].members)

    def spread(self, loads: Mapping[str, int]) -> None:
        """Move requests from idle lanes to lighter ones, in flight or not, once the loads differ by too much.

        The lanes wait for each other in every layer, so a difference costs about half of it in every step. A move costs
        a request its place in one step, so a sixteenth of the load is allowed to differ; beyond that requests move
        until no move brings the loads closer. Afterwards an idle lane exceeds the lightest one by at most that, or by
        the load of its lightest request.
        """
        totals = self._totals(loads)
        if max(totals) - min(totals) <= sum(totals) * ALLOWED_IMBALANCE:
            return
        while True:
            lightest = totals.index(min(totals))
            moves = [
                (abs(totals[index] - totals[lightest] - 2 * loads[request_id]), index, request_id)
                for index, lane in enumerate(self.lanes)
                if not lane.in_flight and index != lightest
                for request_id in lane.members
                if loads[request_id] < totals[index] - totals[lightest]
            ]
            if not moves:
                return
            self.assign(min(moves)[2], lightest)
            totals = self._totals(loads)

    def _totals(self, loads: Mapping[str, int]) -> list[int]:
        return [self.load(index, loads) for index in range(len(self.lanes))]

    def gather(self) -> None:
        """Move the requests of all idle lanes into the first lane."""
        for lane in self.lanes[1:]:
            if not lane.in_flight:
                self.lanes[0].members |= lane.members
                lane.members.clear()


def request_load(context_tokens: int) -> int:
    """Load of one request, in tokens."""
    return context_tokens + TOKENS_PER_REQUEST
