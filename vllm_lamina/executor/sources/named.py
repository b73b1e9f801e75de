"""Attention workers that run already, which the user names: they outlive the engine."""

from __future__ import annotations

import contextlib

from vllm_lamina.executor.cpus import CpuPlacement
from vllm_lamina.executor.sources.base import Addresses, AttentionWorkerSource, by_rank
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.kv_cache.partition import Partition
from vllm_lamina.worker.model_worker.attention_workers import AttentionWorkers


class NamedSource(AttentionWorkerSource):
    """``--lamina-workers``, in the order of the ranks, and ``--lamina-secret-file``."""

    def check(self, geometry: Geometry | None, max_model_len: int) -> list[Partition]:
        """Ask them: whether they answer and are free, and what a KV block takes there."""
        addresses = by_rank(self.options.worker_addresses, self.num_ranks, "--lamina-workers")
        return self._check_running(addresses, geometry, max_model_len)

    def start(self, placement: CpuPlacement, state_bytes: int = 0) -> Addresses:
        """Their addresses."""
        return by_rank(self.options.worker_addresses, self.num_ranks, "--lamina-workers")

    def restart(self, rank: int, place: int, address: str) -> str:
        """Whoever started it may start it again."""
        return address

    def leave(self) -> None:
        """They go on."""

    def close(self) -> None:
        """They go on."""

    def _check_running(
        self, addresses: Addresses, geometry: Geometry | None, max_model_len: int
    ) -> list[Partition]:
        partitions = []
        for of_rank in addresses:
            with contextlib.closing(
                AttentionWorkers.connect(of_rank, secret_file=self.options.secret_file)
            ) as workers:
                workers.check_available(self.options.transport)
                if geometry is not None:
                    partitions.append(workers.divide(self.options.partition, geometry, max_model_len))
        return partitions
