"""Asks an attention worker for its counters about once a second, on a thread and a connection of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from vllm_lamina.transport.address import ControlAddress
from vllm_lamina.transport.control_client import ControlClient
from vllm_lamina.transport.errors import ConnectionFailed
from vllm_lamina.transport.secret import ControlKeys
from vllm_lamina.wire.messages import StatsRequest, WorkerStats

logger = logging.getLogger("vllm.lamina")

POLL_SECONDS = 1.0
ANSWER_SECONDS = 3.0
"""A worker that has not answered for this long is not up."""


class WorkerPoll:
    """Polls one worker until `stop`.

    Parameters
    ----------
    record
        Called on the thread, with what the worker answered, or None if it did not.
    """

    def __init__(self, address: str, secret_file: str, record: Callable[[WorkerStats | None], None]) -> None:
        self._address, self._secret_file, self._record = address, secret_file, record
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name="lamina-worker-poll", daemon=True).start()

    def stop(self) -> None:
        """Let the thread end, within the time of an answer; it records nothing more."""
        self._stopping.set()

    def _run(self) -> None:
        try:
            keys = ControlKeys.from_file(self._secret_file) if self._secret_file else None
            control = ControlClient(ControlAddress.parse(self._address), keys, ANSWER_SECONDS)
        except ConnectionFailed as error:
            logger.warning("Lamina: no metrics of the attention worker at %s: %s.", self._address, error)
            return
        try:
            while not self._stopping.is_set():
                stats = _ask(control)
                if not self._stopping.is_set():
                    self._record(stats)
                self._stopping.wait(POLL_SECONDS)
        finally:
            control.close()


def _ask(control: ControlClient) -> WorkerStats | None:
    try:
        return control.request(StatsRequest(), WorkerStats)
    except ConnectionFailed:
        return None
