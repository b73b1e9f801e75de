"""An engine's deployment on Ray, by way of a process of its own: see `driver_process`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import multiprocessing
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import ConfigError
from vllm_lamina.ray.deployment import Deployment, DeploymentError

logger = logging.getLogger("vllm.lamina")

MARGIN_SECONDS = 240.0
"""For everything but the wait for resources: more than the sum of the driver process's own deadlines."""

REMOVE_SECONDS = 20.0


class RayDeployment:
    """The attention workers that Ray runs for this process's engine.

    They stay as long as this process lives, and for their idle time after that, if `leave` does not end them.

    Raises
    ------
    ConfigError
        Ray is not installed, or the model's ranks cannot share the attention workers evenly.
    """

    def __init__(self, options: LaminaConfig, num_ranks: int) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("lamina option 'ray' needs Ray: pip install 'vllm-lamina[ray]'")
        if options.ray_workers % num_ranks:
            raise ConfigError(
                f"--tensor-parallel-size {num_ranks} needs the same number of attention workers for each rank: choose "
                f"a multiple of it for --lamina-ray-workers, not {options.ray_workers}"
            )
        self._deployment = Deployment.asked_for(options)
        self._addresses: tuple[str, ...] = ()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_lamina.ray.driver_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._leaving = False
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._say(json.dumps(self._deployment.to_plain()))
        self._process.wait()  # it goes on as a process of its own

    @property
    def addresses(self) -> Sequence[str]:
        """Of the attention workers, once they are up and free. Raises DeploymentError."""
        if not self._addresses:
            answer = self._listen(self._deployment.wait_seconds + MARGIN_SECONDS)
            self._addresses = tuple(answer["addresses"])
        return self._addresses

    def leave(self) -> None:
        """Have the attention workers ended, if the engine was told to end; one that failed leaves them for a while.

        Returns at once; `close` waits.
        """
        if isinstance(sys.exception(), Exception) or not _starter_is_alive():
            return
        self._leaving = True
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._say("down")

    def close(self) -> None:
        """End the process that talks with Ray. May be called twice."""
        if self._leaving:
            self._leaving = False
            try:
                self._listen(REMOVE_SECONDS)
            except DeploymentError as error:
                name = self._deployment.name
                logger.warning(
                    "Lamina: the deployment %r stays on Ray for its idle time of %g s (%s); to remove it now: "
                    "vllm-lamina ray down %s",
                    name,
                    self._deployment.idle_seconds,
                    error,
                    name,
                )
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _listen(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            how = "ended; see its output" if readable else f"did not answer within {seconds:g} s"
            raise DeploymentError(
                f"the process that talks with the Ray cluster at {self._deployment.address} {how}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DeploymentError(answer["error"])
        return answer


def _starter_is_alive() -> bool:
    """Whether this process was started by none of Python's, or that one, such as the API server, still runs."""
    starter = multiprocessing.parent_process()
    return starter is None or starter.is_alive()


def addresses_on_ray(options: LaminaConfig, num_ranks: int) -> Sequence[str]:
    """Bring the deployment up before the engine starts; it stays for its idle time, in which the engine joins it.

    Raises
    ------
    LaminaError
        As `RayDeployment` does.
    """
    with contextlib.closing(RayDeployment(options, num_ranks)) as deployment:
        return deployment.addresses
