"""Gets lost attention workers back, or others in their place, while the engine waits or goes on without them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm.logger import init_logger

from vllm_lamina.errors import LaminaError
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import ConnectionFailed

logger = init_logger("vllm.lamina")

FIRST_DELAY, LONGEST_DELAY = 0.1, 2.0
"""Seconds between attempts to reach a worker while everything waits for it; they double."""

FIRST_PROBE_DELAY, LONGEST_PROBE_DELAY = 1.0, 10.0
"""The same while the engine goes on without it."""

PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Recovered:
    """What came of a recovery: places in the partition.

    Attributes
    ----------
    lost
        Workers whose KV blocks are lost.
    down, addresses_down
        Of these, workers that nobody has taken the place of yet, and their addresses.
    seconds
        How long it took.
    """

    lost: frozenset[int]
    down: frozenset[int]
    addresses_down: tuple[str, ...]
    seconds: float


class Recovery:
    """The attention workers' places, who holds them, and who could.

    Parameters
    ----------
    rpc
        Calls a method of each rank's model worker and returns their answers.
    addresses
        Of each rank's workers, by place.
    spares
        Addresses of workers that have no place.
    timeout
        Seconds after which a recovery that everything waits for is given up.
    restart
        Sees that a lost worker comes back: `AttentionWorkerSource.restart`.
    secret_file
        Of workers that run on their own.
    on_change
        Called with the addresses, of each rank's workers, by place, after every recovery.
    """

    def __init__(
        self,
        rpc: Callable[..., list],  # type: ignore[type-arg]
        addresses: Sequence[Sequence[str]],
        *,
        restart: Callable[[int, int, str], str],
        spares: Sequence[str] = (),
        timeout: float,
        secret_file: str = "",
        on_change: Callable[[Sequence[Sequence[str]]], None] = lambda addresses: None,
    ) -> None:
        self._rpc = rpc
        self._on_change = on_change
        self._addresses = [list(of_rank) for of_rank in addresses]
        self._spares = list(spares)
        self._timeout = timeout
        self._restart = restart
        self._secret_file = secret_file
        self._down: frozenset[int] = frozenset()
        self._probing: _Probe | None = None
        self.goes_on_without_some = False
        """Whether the partition allows the engine to go on with the workers that are left."""

    @property
    def may_rejoin(self) -> bool:
        """Whether a worker that could take a place that is empty has answered; then `recover` is worth a call."""
        return self._probing is not None and self._probing.answered

    def recover(self) -> Recovered:
        """Fill the places of lost workers. No step may be in flight.

        Raises
        ------
        LaminaError
            Nobody took a place within the timeout, and the engine cannot go on without; or no worker is lost.
        """
        begin = time.monotonic()
        self._stop_probing()
        missing: list[list[int]] = self._rpc("lost_attention_workers")
        lost = frozenset(place for of_rank in missing for place in of_rank)
        if not lost:
            raise LaminaError(
                "A step failed and no attention worker is lost; see the log of the model worker."
            )
        if not lost <= self._down:
            names = ", ".join(self._names(missing))
            logger.warning("Lamina: attention worker %s is lost; it is started, reached or replaced.", names)
        delay = FIRST_DELAY
        while True:
            missing = self._fill(missing)
            seconds = time.monotonic() - begin
            down = frozenset(place for of_rank in missing for place in of_rank)
            if not down:
                logger.info("Lamina: attention workers complete again after %.2f s.", seconds)
                break
            if self._can_go_on_without(down):
                logger.warning(
                    "Lamina: going on without %s, with less KV cache; it joins again when it, or a spare, answers.",
                    ", ".join(self._names(missing)),
                )
                self._probing = _Probe(functools.partial(self._candidates, missing), self._secret_file)
                break
            if seconds >= self._timeout:
                raise LaminaError(
                    f"Attention worker {', '.join(self._names(missing))} was lost and has not been replaced within "
                    f"{self._timeout:g} s (--lamina-recovery-timeout): start it again, or name others with "
                    "--lamina-spares."
                )
            time.sleep(min(delay, self._timeout - seconds))
            delay = min(2 * delay, LONGEST_DELAY)
        self._down = down
        self._on_change(self._addresses)
        return Recovered(lost, down, tuple(self._names(missing)), seconds)

    def stop(self) -> None:
        """Stop looking for workers."""
        self._stop_probing()

    def _fill(self, missing: list[list[int]]) -> list[list[int]]:
        """One attempt to fill the places; returns those that are still empty, by rank."""
        candidates = [
            {place: [*self._spares, *self._restarted(rank, place)] for place in places}
            for rank, places in enumerate(missing)
        ]
        taken_by_rank: list[dict[int, str]] = self._rpc("replace_attention_workers", args=(candidates,))
        for rank, taken in enumerate(taken_by_rank):
            for place, address in taken.items():
                self._give_place(rank, place, address)
        return [
            [place for place in places if place not in taken]
            for places, taken in zip(missing, taken_by_rank, strict=True)
        ]

    def _restarted(self, rank: int, place: int) -> list[str]:
        """Where the worker itself answers again, or may; nowhere if that failed."""
        try:
            return [self._restart(rank, place, self._addresses[rank][place])]
        except LaminaError as error:
            logger.error("Lamina: %s.", error)
            return []

    def _give_place(self, rank: int, place: int, address: str) -> None:
        before = self._addresses[rank][place]
        self._addresses[rank][place] = address
        if address in self._spares:
            self._spares.remove(address)
            self._spares.append(before)
        logger.info("Lamina: attention worker %s takes the place of %s.", address, before)

    def _can_go_on_without(self, down: frozenset[int]) -> bool:
        return self.goes_on_without_some and len(down) < len(self._addresses[0])

    def _candidates(self, missing: list[list[int]]) -> list[str]:
        places = [(rank, place) for rank, places in enumerate(missing) for place in places]
        return [address for where in places for address in self._restarted(*where)] + self._spares

    def _names(self, missing: list[list[int]]) -> list[str]:
        return [self._addresses[rank][place] for rank, places in enumerate(missing) for place in places]

    def _stop_probing(self) -> None:
        if self._probing is not None:
            self._probing.stop()
            self._probing = None


class _Probe:
    """Greets workers from a thread of its own until one of them answers that serves nobody."""

    def __init__(self, addresses: Callable[[], Sequence[str]], secret_file: str) -> None:
        self._addresses, self._secret_file = addresses, secret_file
        self.answered = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lamina-probe", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        delay = FIRST_PROBE_DELAY
        while not self._stopping.wait(delay):
            delay = min(2 * delay, LONGEST_PROBE_DELAY)
            for address in self._addresses():
                try:
                    with AttentionWorkerConnection.connect(
                        address, PROBE_SECONDS, secret_file=self._secret_file
                    ):
                        self.answered = True
                        return
                except ConnectionFailed:
                    continue
