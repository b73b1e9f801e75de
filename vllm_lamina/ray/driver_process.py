"""The process that talks with Ray for an engine: reads a deployment, answers with its addresses, and keeps it.

    python -m vllm_lamina.ray.driver_process

Reads a line of JSON, `Deployment.to_plain`, from standard input, and answers with one line: ``{"addresses": [...]}`` or
``{"error": "..."}``. Then it tells the actors every few seconds that the engine lives, until standard input says
``down``, which it answers with ``{}`` when the deployment is removed, or ends, or the engine does: then the deployment
stays.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import signal
import sys
import threading
from pathlib import Path
from typing import IO, NoReturn

from vllm_lamina.ray.cluster import bring_up, connected, keep, take_down, wait_until_left
from vllm_lamina.ray.deployment import Deployment, DeploymentError

KEEP_SECONDS = 5.0

logger = logging.getLogger("vllm_lamina.ray")


def main() -> int:
    """Serve one engine; returns the exit status."""
    # The engine decides, also where a terminal or a supervisor signals all processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = os.pidfd_open(os.getppid())
    if os.fork():
        # vLLM kills all descendants of an engine that takes too long to end; this one may have to clean up then.
        os._exit(0)
    # Ray prints; what is read by the engine goes another way.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.basicConfig(format="%(levelname)s Lamina, Ray: %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    deployment = Deployment.from_plain(json.loads(_read_line()))
    orders = _Orders(engine)

    def give_up(problem: str) -> NoReturn:
        _answer(answers, {"error": problem})
        os._exit(1)

    try:
        with connected(deployment.address, give_up):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has put its own handler there
            orders.connected.set()
            _answer(answers, {"addresses": bring_up(deployment, orders.engine_is_there)})
            _serve(deployment, orders, answers)
    except DeploymentError as error:
        _answer(answers, {"error": str(error)})
        return 1
    return 0


class _Orders:
    """What the engine says on standard input, read by a thread: ``down``, or nothing more because it has gone."""

    def __init__(self, engine: int) -> None:
        self.connected = threading.Event()
        self._received: queue.Queue[str] = queue.Queue()
        self._gone = threading.Event()
        threading.Thread(target=self._listen, args=(engine,), name="lamina-orders", daemon=True).start()

    def engine_is_there(self) -> bool:
        return not self._gone.is_set()

    def wait(self, seconds: float) -> str:
        """The next order, ``down`` or ``gone``; empty if there is none in that time."""
        try:
            return self._received.get(timeout=seconds)
        except queue.Empty:
            return ""

    def _listen(self, engine: int) -> None:
        ready, _, _ = select.select([0, engine], [], [])
        if 0 in ready and b"down" in os.read(0, 64):
            self._received.put("down")
            return
        if not self.connected.is_set():
            os._exit(0)  # Ray does not let go of a thread that waits for its cluster
        self._gone.set()
        self._received.put("gone")


def _serve(deployment: Deployment, orders: _Orders, answers: IO[str]) -> None:
    pause = min(KEEP_SECONDS, deployment.idle_seconds / 4)
    trouble = ""
    while not (order := orders.wait(pause)):
        try:
            keep(deployment)
            trouble = ""
        except Exception as error:  # Ray may come back; the attention workers do without it
            if str(error) != trouble:
                trouble = str(error)
                logger.warning("the deployment %r cannot be looked after: %s", deployment.name, trouble)
    if order == "down":
        wait_until_left(deployment.name)
        take_down(deployment.name)
        Path(deployment.secret_file).unlink(missing_ok=True)
        _answer(answers, {})


def _read_line() -> str:
    """Not more than the line: `_Orders` reads the rest."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line.decode()


def _answer(answers: IO[str], message: dict[str, object]) -> None:
    try:
        answers.write(json.dumps(message) + "\n")
    except BrokenPipeError:
        return


if __name__ == "__main__":
    sys.exit(main())
