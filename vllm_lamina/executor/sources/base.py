"""What an engine needs to know of where its attention workers come from."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TypeVar

from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.cpus import CpuPlacement
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.kv_cache.partition import Partition

Addresses = list[tuple[str, ...]]
"""Of attention workers: for each rank of the model, by place in its partition."""


class AttentionWorkerSource(abc.ABC):
    """Where the attention workers of one engine come from.

    Parameters
    ----------
    options
        The engine's.
    num_ranks
        Ranks of the model; each has as many attention workers as the others.
    """

    def __init__(self, options: LaminaConfig, num_ranks: int) -> None:
        self.options, self.num_ranks = options, num_ranks

    @abc.abstractmethod
    def check(self, geometry: Geometry | None, max_model_len: int) -> list[Partition]:
        """Find out what can be known before the model is loaded; the geometry may be what only the model says.

        Returns
        -------
        list
            How each rank's attention workers will divide the KV cache; empty where that depends on what the model
            leaves.

        Raises
        ------
        LaminaError
            The attention workers cannot be had, or not for this model.
        """

    @abc.abstractmethod
    def start(self, placement: CpuPlacement, state_bytes: int = 0) -> Addresses:
        """Start the attention workers, or find them, once the model is loaded.

        Parameters
        ----------
        placement
            CPUs of this host, for attention workers that run here.
        state_bytes
            Memory of this host that the model workers will still take, for states.

        Raises
        ------
        LaminaError
            They cannot be had.
        """

    @abc.abstractmethod
    def restart(self, rank: int, place: int, address: str) -> str:
        """See that an attention worker that was lost comes back, and return where: at ``address``, or at a new one.

        Called again and again until a worker answers there, and by one thread at a time.

        Raises
        ------
        LaminaError
            It did not come back this time.
        """

    @abc.abstractmethod
    def leave(self) -> None:
        """The engine is about to end, its model workers first. Returns at once: vLLM kills engines that take long."""

    @abc.abstractmethod
    def close(self) -> None:
        """End what was started for this engine. May be called twice, and before `start`."""


WorkerT = TypeVar("WorkerT")


def by_rank(workers: Sequence[WorkerT], num_ranks: int, option: str) -> list[tuple[WorkerT, ...]]:
    """Each rank of a tensor-parallel model has attention workers of its own, for the heads that it has.

    Raises
    ------
    ConfigError
        The workers, of which ``option`` says how many there are, cannot be shared out evenly.
    """
    each, left = divmod(len(workers), num_ranks)
    if left or not each:
        raise ConfigError(
            f"--tensor-parallel-size {num_ranks} needs the same number of attention workers for each rank: choose a "
            f"multiple of it for {option}, not {len(workers)}"
        )
    return [tuple(workers[rank * each : (rank + 1) * each]) for rank in range(num_ranks)]
