"""What processes hold, so that what they do not give back shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Footprint:
    """Of one process, or of several together."""

    descriptors: int
    threads: int
    mappings: int
    """Of shared memory that has no file, as channels use it."""

    def __add__(self, other: Footprint) -> Footprint:
        sums = (self.descriptors + other.descriptors, self.threads + other.threads)
        return Footprint(*sums, self.mappings + other.mappings)

    def __str__(self) -> str:
        return f"{self.descriptors} descriptors, {self.threads} threads, {self.mappings} shared mappings"

    def is_about(self, before: Footprint) -> bool:
        """Whether it has not grown, but for what a client or a library may open late."""
        return (
            self.descriptors <= before.descriptors + 4
            and self.threads <= before.threads + 3
            and self.mappings <= before.mappings
        )


NOTHING = Footprint(0, 0, 0)


def footprint(*pids: int) -> Footprint:
    """Of processes; one that has ended holds nothing."""
    return sum(map(_footprint, pids), NOTHING)


def descriptors(*pids: int) -> dict[str, int]:
    """How many descriptors of each sort the processes have open: what to say of a leak."""
    found: dict[str, int] = {}
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                sort = re.sub(r"\d+", "N", str(link.readlink()))
                found[sort] = found.get(sort, 0) + 1
        except OSError:
            continue
    return dict(sorted(found.items()))


def _footprint(pid: int) -> Footprint:
    process = Path(f"/proc/{pid}")
    try:
        return Footprint(
            len(list((process / "fd").iterdir())),
            len(list((process / "task").iterdir())),
            (process / "maps").read_text(errors="replace").count("/memfd:"),
        )
    except OSError:
        return NOTHING
