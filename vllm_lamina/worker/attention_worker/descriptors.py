"""The open files of an attention worker: how many there may be, and how many of them strangers cannot take."""

import contextlib
import os
import resource
from collections.abc import Iterator

from vllm_lamina.transport.listener import MAX_WAITING_CLIENTS

MIN_DESCRIPTORS = 128
"""Open files without which no worker starts: ZeroMQ ends the process where it gets none, and an engine needs some."""

MAX_DESCRIPTORS = 4096
"""Strangers hold a descriptor, and some memory, each until the time of their handshake is up."""

SPARE_DESCRIPTORS = 2 * MAX_WAITING_CLIENTS
"""Kept from strangers, for the data channel of the engine that was admitted. Whoever waits to be accepted takes some of
them as soon as they are given back."""


def limit_descriptors() -> None:
    """Take the descriptors that this process may have, up to `MAX_DESCRIPTORS`.

    Raises
    ------
    ValueError
        There are too few.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = MAX_DESCRIPTORS if most == resource.RLIM_INFINITY else min(most, MAX_DESCRIPTORS)
    if number < MIN_DESCRIPTORS:
        raise ValueError(
            f"this process may open {number} files, and a worker needs {MIN_DESCRIPTORS}: raise the hard limit "
            "(ulimit -Hn, systemd's LimitNOFILE)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, most))


def max_clients() -> int:
    """Clients of the control connection at a time: an eighth of the descriptors.

    Others are the worker's own and the engine's, and more clients may have come before the control thread knows.
    """
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8


class SpareDescriptors:
    """Open files kept for who is admitted, when strangers hold all others that this process may have."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self._take()

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while len(self._held) < SPARE_DESCRIPTORS:
                self._held.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Let the body have them; those that it does not use are taken back."""
        self.close()
        try:
            yield
        finally:
            self._take()

    def close(self) -> None:
        """Give them back."""
        while self._held:
            os.close(self._held.pop())
