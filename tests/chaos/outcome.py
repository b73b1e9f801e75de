"""What a run under storms did and found, for people and for replaying it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from footprint import NOTHING, Footprint
from layouts import Layout
from storms import Storm
from traffic import Traffic

FAILURES_SHOWN = 20
LOG_LINES_SHOWN = 20


@dataclass
class Outcome:
    """Times are seconds since the server was warm."""

    layout: Layout
    seed: int
    seconds: float = 0.0
    storms: list[Storm] = field(default_factory=list)
    happened: list[tuple[float, str]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    answered: int = 0
    hung_up: int = 0
    tokens: int = 0
    pause: tuple[float, float] = (0.0, 0.0)
    """The longest time without a token of a stream, and when it began."""
    late: tuple[float, float] = (0.0, 0.0)
    """The longest time for which this machine had no time for this program, and when it began."""
    answered_after: list[float] = field(default_factory=list)
    """From the end of each storm to the answer to a question asked then."""
    recoveries: list[float] = field(default_factory=list)
    """How long each took, as the engine says."""
    logged: list[str] = field(default_factory=list)
    """What the engine said of lost workers and of recovery."""
    engine: tuple[Footprint, Footprint] = (NOTHING, NOTHING)
    """Of the engine's processes, before the first storm and in the end."""
    failures: list[str] = field(default_factory=list)

    def count(self, traffic: Traffic, start: float) -> None:
        """Take over what came of the requests; `start` is the time at which the server was warm."""
        good = [asked.reply for asked in traffic.replies if asked.failure is None]
        self.requests = len(traffic.replies) + traffic.num_in_flight
        self.hung_up = sum(reply.hung_up for reply in good)
        self.answered = len(good) - self.hung_up
        self.tokens = sum(len(reply.token_ids) for reply in good)
        seconds, began = max((reply.longest_pause for reply in good), default=(0.0, start))
        self.pause = seconds, began - start
        self.failures += traffic.failures

    def summary(self) -> str:
        failed = self.requests - self.answered - self.hung_up
        seconds, began = self.pause
        before, after = self.engine
        lines = [
            f"layout        {self.layout}, seed {self.seed}, {self.seconds:.0f} s",
            f"requests      {self.requests}: {self.answered} answered, {self.hung_up} left by their clients, "
            f"{failed} failed; {self.tokens} tokens",
            f"disturbances  {', '.join(f'{kind} {count}' for kind, count in sorted(self.kinds.items())) or 'none'}",
            f"pause         at most {seconds:.2f} s without a token in a stream, from {began:.2f} s on",
            f"machine       busy or asleep for up to {self.late[0]:.2f} s, from {self.late[1]:.2f} s on",
            f"storms        {len(self.storms)}; a question asked at the end of one was answered in "
            f"{_times(self.answered_after)}",
            f"recoveries    {len(self.recoveries)}, in {_times(self.recoveries)} by the engine's log",
            f"engine        at first {before}; in the end {after}",
            *(f"log           {line}" for line in (self.logged[-LOG_LINES_SHOWN:] if self.failures else ())),
            *(f"FAILED        {failure}" for failure in self.failures[:FAILURES_SHOWN]),
        ]
        if len(self.failures) > FAILURES_SHOWN:
            lines.append(f"FAILED        and {len(self.failures) - FAILURES_SHOWN} more")
        return "\n".join(lines)

    def write_events(self, file: Path) -> None:
        """What happened, and the storms, which `python -m tests.chaos --replay` takes."""
        data = {
            "layout": str(self.layout),
            "seed": self.seed,
            "storms": [storm.to_dict() for storm in self.storms],
            "happened": self.happened,
            "failures": self.failures,
        }
        file.write_text(json.dumps(data, indent=1))


def _times(seconds: list[float]) -> str:
    return f"{median(seconds):.2f} s (median), {max(seconds):.2f} s (longest)" if seconds else "no time"
