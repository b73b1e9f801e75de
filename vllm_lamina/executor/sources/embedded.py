"""Attention workers that the engine starts itself, one for each rank, on its host, and ends with itself."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
from collections.abc import Sequence

from vllm_lamina.config import AUTO, LaminaConfig
from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.cpus import CpuPlacement
from vllm_lamina.executor.sources.base import Addresses, AttentionWorkerSource
from vllm_lamina.host import available_memory, cgroup_memory, memory_total
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.kv_cache.partition import Partition, Pool, divide
from vllm_lamina.units import format_bytes, format_cpus, parse_bytes
from vllm_lamina.worker.attention_worker.child import ChildAttentionWorker

logger = logging.getLogger("vllm.lamina")

SHARE_OF_FREE_MEMORY = 0.7
"""Of the memory free once the model is loaded, what ``--lamina-memory auto`` gives to the KV pool."""


class EmbeddedAttentionWorker(ChildAttentionWorker):
    """An attention worker of this process alone.

    Examples
    --------
    >>> worker = EmbeddedAttentionWorker.start(memory_bytes=4 << 30, cpus=[1])
    >>> connection = AttentionWorkerConnection.connect(worker.address)
    >>> worker.stop()
    """

    @classmethod
    def start(
        cls, memory_bytes: int, cpus: Sequence[int] = (), log_prefix: str = "", timeout: float = 30.0
    ) -> EmbeddedAttentionWorker:
        """Start a worker and wait until it answers.

        Parameters
        ----------
        memory_bytes
            Memory for KV blocks.
        cpus
            One thread is pinned to each; empty for one unpinned thread per CPU of this process.
        log_prefix
            Put before each line of the worker's log, which goes to this process's standard error.
        timeout
            Seconds to wait.

        Raises
        ------
        WorkerUnreachable
            The worker ended, or did not answer in time.
        """
        address = f"ipc://@vllm-lamina-control-{os.getpid()}-{secrets.token_hex(8)}"
        options = ["--memory", str(memory_bytes), f"--log-prefix={log_prefix}"]
        worker = cls(address, [*options, "--cpus", format_cpus(cpus)] if cpus else options)
        try:
            worker.wait_until_it_answers(timeout)
        except BaseException:
            worker.stop()
            raise
        return worker


class EmbeddedSource(AttentionWorkerSource):
    """Starts an attention worker for each rank, which get what memory and CPUs the model leaves, or as asked.

    Parameters
    ----------
    kv_cache_memory_bytes
        What vLLM was given for the KV cache, for all ranks; 0 or None if nothing.
    """

    def __init__(
        self, options: LaminaConfig, num_ranks: int, kv_cache_memory_bytes: int | None = None
    ) -> None:
        super().__init__(options, num_ranks)
        self._kv_cache_memory_bytes = kv_cache_memory_bytes
        self._cpus: tuple[tuple[int, ...], ...] = ()
        self._pool_bytes = 0
        self._workers: list[EmbeddedAttentionWorker] = []

    def check(self, geometry: Geometry | None, max_model_len: int) -> list[Partition]:
        """With a pool as large as asked; the memory that is free is known once the model is loaded."""
        if self.options.memory == AUTO:
            return []
        memory = parse_bytes(self.options.memory)
        _check_this_host_has(memory)
        if geometry is None:
            return []
        pool = Pool("", memory // self.num_ranks)
        partition = divide(
            self.options.partition, [pool], geometry, lambda _, part: part.block_bytes(), max_model_len
        )
        return [partition] * self.num_ranks

    def start(self, placement: CpuPlacement, state_bytes: int = 0) -> Addresses:
        """Start an attention worker for each rank."""
        if placement.shared:
            logger.warning(
                "Lamina: attention workers (CPUs %s) and model workers share CPUs; both will be slower. Choose "
                "disjoint ones with --lamina-worker-cpus and VLLM_CPU_OMP_THREADS_BIND.",
                format_cpus({cpu for cpus in placement.worker_cpus for cpu in cpus}),
            )
        elif placement.shared_cores:
            logger.warning(
                "Lamina: hyperthreads of the same cores (CPUs %s) serve different workers, which will be slower. Give "
                "each worker whole cores with --lamina-worker-cpus and VLLM_CPU_OMP_THREADS_BIND.",
                format_cpus(itertools.chain(*placement.shared_cores)),
            )
        self._cpus = placement.worker_cpus
        self._pool_bytes = self._memory_bytes(state_bytes) // self.num_ranks
        for rank in range(self.num_ranks):
            self._workers.append(self._start_worker(rank))
        return [(worker.address,) for worker in self._workers]

    def restart(self, rank: int, place: int, address: str) -> str:
        """Start another one in its place."""
        self._workers[rank].kill()  # it may be stopped, or hang
        self._workers[rank] = self._start_worker(rank)
        return self._workers[rank].address

    def leave(self) -> None:
        """The model workers still need them."""

    def close(self) -> None:
        """End them."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def _start_worker(self, rank: int) -> EmbeddedAttentionWorker:
        cpus = self._cpus[rank]
        worker = EmbeddedAttentionWorker.start(self._pool_bytes, cpus)
        logger.info(
            "Lamina: attention worker started, pid %d, CPUs %s, KV pool %s.",
            worker.pid,
            format_cpus(cpus),
            format_bytes(self._pool_bytes),
        )
        return worker

    def _memory_bytes(self, state_bytes: int) -> int:
        free = available_memory() - state_bytes
        asked = self._kv_cache_memory_bytes
        if self.options.memory != AUTO:
            asked = parse_bytes(self.options.memory)
        if asked and state_bytes and asked > free:
            raise ConfigError(
                f"lamina option 'memory': {format_bytes(asked)} and the {format_bytes(state_bytes)} of the states of "
                f"--max-num-seqs requests are more than the {format_bytes(free + state_bytes)} that are free: choose "
                "less memory, or fewer requests"
            )
        return asked or int(SHARE_OF_FREE_MEMORY * free)


def _check_this_host_has(pool_bytes: int) -> None:
    """The system hands memory out page by page, so a pool that cannot fit would end the worker much later."""
    limit = min([memory_total(), *(limit for limit, _ in cgroup_memory())])
    if pool_bytes > limit:
        raise ConfigError(
            f"lamina option 'memory': {format_bytes(pool_bytes)} is more than this host has, or allows this process: "
            f"{format_bytes(limit)}: choose less"
        )
