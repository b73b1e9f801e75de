"""Random sequences of disturbances, the same for the same seed, from which the system can recover."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from layouts import EMBEDDED, HOSTS, Layout

LONGEST_OUTAGE = 8.0
"""Seconds for which one disturbance keeps a worker away; the time for its process to start comes on top."""

LONGEST_STORM = 20.0
"""Seconds from the first disturbance of a storm to the end of the last."""

NOTICED = 3.0
"""Seconds after which a worker that does not answer is taken for lost, at the latest; where it is a child, after 1."""

LEASE = 10.0
"""Seconds after which a worker forgets an engine that is silent."""


class Kind(StrEnum):
    """What is done. All but the last two are done to a worker, for some seconds."""

    KILL = "kill"
    """SIGKILL. A worker of its own is started again at its address; an embedded one is the engine's to start."""
    PAUSE = "pause"
    """SIGSTOP, later SIGCONT."""
    CUT = "cut"
    """Its cable is out: its system knows."""
    DEAF = "deaf"
    """What is sent to it is lost."""
    MUTE = "mute"
    """What it sends is lost."""
    ENGINE_PAUSE = "engine-pause"
    """SIGSTOP, later SIGCONT, to the engine's processes: the workers' leases end."""
    BURST = "burst"
    """Many requests at once."""
    ABORTS = "aborts"
    """Many clients hang up at once."""


TO_LINKS = (Kind.CUT, Kind.DEAF, Kind.MUTE)
TO_CLIENTS = (Kind.BURST, Kind.ABORTS)


@dataclass(frozen=True)
class Disturbance:
    """At a time of its storm, in seconds; `worker` counts from 0, the spare is the last; `count` is of requests."""

    at: float
    kind: Kind
    worker: int = -1
    seconds: float = 0.0
    count: int = 0

    @property
    def end(self) -> float:
        return self.at + self.seconds

    @property
    def is_an_outage(self) -> bool:
        """Whether it is one for sure: short pauses may go unnoticed."""
        return self.kind == Kind.KILL or self.seconds > (
            LEASE if self.kind == Kind.ENGINE_PAUSE else NOTICED + 1
        )

    def __str__(self) -> str:
        if self.kind in TO_CLIENTS:
            return f"{self.kind} of {self.count}"
        victim = "" if self.kind == Kind.ENGINE_PAUSE else f" worker {self.worker}"
        return f"{self.kind}{victim} for {self.seconds:.1f} s"


@dataclass(frozen=True)
class Storm:
    """Disturbances that may overlap, in the order of their times, and then `calm` seconds without any."""

    disturbances: tuple[Disturbance, ...]
    calm: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        items = (item | {"kind": Kind(item["kind"])} for item in data["disturbances"])
        return cls(tuple(Disturbance(**item) for item in items), data["calm"])

    def only(self, kinds: frozenset[Kind]) -> Storm:
        """Without the disturbances of other kinds."""
        chosen = tuple(disturbance for disturbance in self.disturbances if disturbance.kind in kinds)
        return dataclasses.replace(self, disturbances=chosen)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def storms(layout: Layout, seed: int) -> Iterator[Storm]:
    """Storms without end.

    Workers are away one at a time or several together, for at most `LONGEST_OUTAGE` each; so at the end of a storm,
    at most `LONGEST_STORM` after its begin, all are there, and nothing happens before the engine has recovered.
    """
    rng = random.Random(f"{seed} {layout}")
    while True:
        found: list[Disturbance] = []
        free_at = [0.0] * layout.num_machines
        for _ in range(rng.choice((1, 1, 2, 3))):
            worker = rng.randrange(layout.num_machines)
            kind = _kind(layout, rng)
            start = free_at[worker] + rng.uniform(0.3, 2.0)
            disturbance = Disturbance(round(start, 2), kind, worker, _seconds(layout, kind, rng))
            if disturbance.end > LONGEST_STORM:
                continue
            found.append(disturbance)
            if kind == Kind.ENGINE_PAUSE:
                free_at = [max(end, disturbance.end) for end in free_at]
            else:
                free_at[worker] = disturbance.end
        for kind in TO_CLIENTS:
            if rng.random() < 0.4:
                at = rng.uniform(0.0, max(disturbance.end for disturbance in found))
                found.append(Disturbance(round(at, 2), kind, count=rng.randint(8, 60)))
        found.sort(key=lambda disturbance: disturbance.at)
        yield Storm(tuple(found), calm=round(rng.uniform(1.0, 4.0), 2))


def _kind(layout: Layout, rng: random.Random) -> Kind:
    weights = {Kind.KILL: 5, Kind.PAUSE: 5, Kind.ENGINE_PAUSE: 1}
    if layout.network == HOSTS:
        weights |= dict.fromkeys(TO_LINKS, 2)
    return rng.choices(list(weights), list(weights.values()))[0]


def _seconds(layout: Layout, kind: Kind, rng: random.Random) -> float:
    """Too short to be noticed, long enough to be, or such that it depends."""
    if kind == Kind.KILL and layout.workers == EMBEDDED:
        return 0.0  # when the engine starts it again is the engine's affair
    ranges = [(0.05, 0.8), (0.8, NOTICED + 1), (NOTICED + 1, LONGEST_OUTAGE)]
    if kind == Kind.ENGINE_PAUSE:
        ranges[-1] = (LEASE + 1, LEASE + 3)
    return round(rng.uniform(*rng.choice(ranges)), 2)
