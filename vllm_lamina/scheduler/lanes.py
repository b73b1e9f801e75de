"""Which request belongs to which lane: two disjoint batches of about the same load, or one where two would not pay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

TOKENS_PER_REQUEST = 128
"""What a request costs beside its context, in tokens of context: its share of a step outside of attention."""

ALLOWED_IMBALANCE = 1 / 16
"""Part of the total load by which lanes may differ before requests move."""


@dataclass
class Lane:
    """One of the staggered batches."""

    members: set[str] = field(default_factory=set)
    """Running requests that this lane schedules."""
    in_flight: bool = False
    """A step of this lane is on the model worker."""
    previous: set[str] = field(default_factory=set)
    """Requests of the lane's last step: what its input batch on the model worker holds."""
    adapters: set[int] = field(default_factory=set)
    """LoRA adapters that the step in flight needs."""


class Lanes:
    """Assigns running requests to lanes and keeps the lanes' loads together.

    A request is a member of at most one lane, and never leaves a lane whose step is in flight. Load is counted in
    tokens: a request's context, which its attention reads, and `TOKENS_PER_REQUEST`.

    Parameters
    ----------
    num_lanes
        Number of batches in flight.
    """

    def __init__(self, num_lanes: int) -> None:
        self.lanes = [Lane() for _ in range(num_lanes)]
        self._last = num_lanes - 1

    def next_idle(self, useful: Iterable[int]) -> int | None:
        """The lane to schedule next: of those that are idle and ``useful`` the one whose turn is longest ago.

        It has had its turn then, even if nothing of it can be scheduled, for want of blocks say: else the other lane,
        which could give some back, would never come.
        """
        candidates = [index for index in useful if not self.lanes[index].in_flight]
        if not candidates:
            return None
        num_lanes = len(self.lanes)
        self._last = min(candidates, key=lambda index: (index - self._last - 1) % num_lanes)
        return self._last

    def begin_step(self, index: int, scheduled: Iterable[str], adapters: Iterable[int]) -> None:
        """A step of a lane goes to the model worker."""
        lane = self.lanes[index]
        lane.in_flight = True
        lane.previous = set(scheduled)
        lane.adapters = set(adapters)

    def end_step(self, index: int) -> None:
        """The output of the lane's step has arrived."""
        self.lanes[index].in_flight = False
        self.lanes[index].adapters.clear()

    def assign(self, request_id: str, index: int) -> None:
        """Make a request a member of one lane and of no other."""
        for lane in self.lanes:
            lane.members.discard(request_id)
        self.lanes[index].members.add(request_id)

    def keep_only(self, running: Iterable[str]) -> None:
        """Forget the requests that run no more."""
        running = set(running)
        for lane in self.lanes:
            lane.members &= running

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
