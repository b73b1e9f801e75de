"""Which attention workers a server under chaos has, where they are and how they divide the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

EMBEDDED, ONE = "embedded", "one"
PARTITIONS = ("head", "sequence", "request")
SHM, UCX, HOSTS = "shm", "ucx", "hosts"
NETWORKS = (SHM, UCX, HOSTS)
"""Shared memory, UCX over loopback, and UCX between hosts that network namespaces stand for."""


@dataclass(frozen=True)
class Layout:
    """Written `embedded`, `one@NETWORK`, or `PARTITION@NETWORK` for three workers; `+spare` after the partition."""

    workers: str
    has_spare: bool = False
    network: str = SHM

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError."""
        workers, _, network = text.partition("@")
        workers, plus, spare = workers.partition("+")
        layout = cls(workers, bool(plus), network or SHM)
        if (
            workers not in (EMBEDDED, ONE, *PARTITIONS)
            or layout.network not in NETWORKS
            or (plus and spare != "spare")
            or (workers == EMBEDDED and (plus or network))
        ):
            raise ValueError(
                f"no such layout: {text!r}; there are {EMBEDDED}, and one of {', '.join((ONE, *PARTITIONS))}, "
                f"then perhaps +spare, then one of {', '.join('@' + name for name in NETWORKS)}"
            )
        return layout

    def __str__(self) -> str:
        if self.workers == EMBEDDED:
            return EMBEDDED
        return f"{self.workers}{'+spare' if self.has_spare else ''}@{self.network}"

    @property
    def num_workers(self) -> int:
        """That the engine uses at a time."""
        return 3 if self.workers in PARTITIONS else 1

    @property
    def num_machines(self) -> int:
        """With a worker each, a spare included."""
        return self.num_workers + self.has_spare

    @property
    def partition(self) -> str | None:
        return self.workers if self.workers in PARTITIONS else None


EVERY = tuple(
    Layout.parse(text)
    for text in (
        EMBEDDED,
        "one@shm",
        "one@hosts",
        *(f"{partition}{spare}@{network}" for partition in PARTITIONS for spare, network in
          (("", SHM), ("", HOSTS), ("+spare", UCX), ("+spare", HOSTS))),
    )
)  # fmt: skip
"""Each partition with and without a spare, and each network."""
