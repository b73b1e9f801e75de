"""Attention workers that Ray runs; a child talks with it, so Ray's threads and signal handlers are in no engine."""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import os
import select
import subprocess
import sys

from vllm_lamina import run_module
from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.cpus import CpuPlacement
from vllm_lamina.executor.sources.base import Addresses, by_rank
from vllm_lamina.executor.sources.named import NamedSource
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.kv_cache.partition import Partition
from vllm_lamina.ray.deployment import DeploymentError, up_flags

logger = logging.getLogger("vllm.lamina")

MARGIN_SECONDS = 300.0
"""For everything but the wait for resources: more than the sum of the command's own deadlines."""

REMOVE_SECONDS = 20.0


class RaySource(NamedSource):
    """Attention workers named by ``vllm-lamina ray up``, whose deployment ends with an engine that is told to end.

    Raises
    ------
    ConfigError
        Ray is not installed, or the model's ranks cannot share the attention workers evenly.
    """

    def __init__(self, options: LaminaConfig, num_ranks: int) -> None:
        super().__init__(options, num_ranks)
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("lamina option 'ray' needs Ray: pip install 'vllm-lamina[ray]'")
        by_rank(range(options.ray_workers), num_ranks, "--lamina-ray-workers")
        self._addresses: Addresses = []
        self._looking: _Up | None = None
        self._leaving: subprocess.Popen[str] | None = None

    def check(self, geometry: Geometry | None, max_model_len: int) -> list[Partition]:
        """Bring the deployment up; it stays for its idle time, in which the engine joins it."""
        return self._check_running(self._bring_up(), geometry, max_model_len)

    def start(self, placement: CpuPlacement, state_bytes: int = 0) -> Addresses:
        """Bring it up again: while a very large model was loaded its idle time may have passed."""
        self._addresses = self._bring_up()
        return self._addresses

    def restart(self, rank: int, place: int, address: str) -> str:
        """Its actor starts it again at its address; meanwhile ``ray up`` replaces an actor that died, maybe elsewhere.

        So an address that is new is that of a later call.
        """
        if self._looking is None:
            self._looking = _Up(self.options, unused=False)
        elif self._looking.has_ended():
            looking, self._looking = self._looking, None
            try:
                self._addresses = self._by_rank(looking.addresses())
            except DeploymentError as error:
                logger.error("Lamina: %s.", error)
        return self._addresses[rank][place]

    def leave(self) -> None:
        """Have the deployment removed, if the engine was told to end; one that failed leaves it for its idle time."""
        if self._looking is not None:
            self._looking.terminate()
        if isinstance(sys.exception(), Exception) or not _starter_is_alive():
            return
        # Where this engine has not joined it yet, another one may have.
        joined = ["--force"] if self._addresses else []
        command = _command("down", self.options, "--leaving", *joined)
        self._leaving = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        """Wait until it is removed."""
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.stop()
        leaving, self._leaving = self._leaving, None
        if leaving is None:
            return
        leaving.wait()  # it goes on as a process of its own
        assert leaving.stdout is not None
        with leaving.stdout as answers:
            readable, _, _ = select.select([answers], [], [], REMOVE_SECONDS)
            if readable and answers.readline():
                return
        name = self.options.ray_name
        logger.warning(
            "Lamina: the deployment %r has not been removed; it stays on Ray for its idle time of %g s. To remove it "
            "now: vllm-lamina ray down %s",
            name,
            self.options.ray_idle_seconds,
            name,
        )

    def _bring_up(self) -> Addresses:
        return self._by_rank(_Up(self.options, unused=True).addresses())

    def _by_rank(self, addresses: list[str]) -> Addresses:
        return by_rank(addresses, self.num_ranks, "--lamina-ray-workers")


class _Up:
    """A ``vllm-lamina ray up`` that runs; ``unused`` if it is to fail where another engine uses the deployment."""

    def __init__(self, options: LaminaConfig, *, unused: bool) -> None:
        self._options = options
        command = _command("up", options, "--parent-pid", str(os.getpid()), "--json")
        command += [f"{flag}={getattr(options, field.name)}" for flag, field in up_flags().items()]
        command += ["--unused"] if unused else []
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def addresses(self) -> list[str]:
        """Wait for its answer. Raises DeploymentError."""
        seconds = self._options.ray_wait_seconds + MARGIN_SECONDS
        try:
            output, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            raise DeploymentError(
                f"the Ray cluster at {self._options.ray} did not bring the deployment up within {seconds:g} s"
            ) from None
        except BaseException:
            self.stop()
            raise
        if not output:
            raise DeploymentError(
                f"`vllm-lamina ray up` ended with status {self._process.returncode}; see its output"
            )
        answer = json.loads(output)
        if "error" in answer:
            raise DeploymentError(answer["error"])
        addresses: list[str] = answer["addresses"]
        return addresses

    def terminate(self) -> None:
        """Tell it to end; it undoes what it has begun."""
        self._process.terminate()

    def stop(self) -> None:
        """End it."""
        self.terminate()
        try:
            self._process.communicate(timeout=REMOVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _command(action: str, options: LaminaConfig, *arguments: str) -> list[str]:
    command = [*run_module.command("vllm_lamina.cli"), "ray", action, options.ray_name]
    return [*command, "--address", options.ray, *arguments]


def _starter_is_alive() -> bool:
    """Whether this process was started by none of Python's, or that one, such as the API server, still runs."""
    starter = multiprocessing.parent_process()
    return starter is None or starter.is_alive()
