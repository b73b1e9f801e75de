"""Executors that run vLLM's model worker beside an attention worker: with worker processes, and in one process."""

from __future__ import annotations

import os
from typing import Any

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_lamina.compat.threads import ThisProcessOn, model_workers_bound_to
from vllm_lamina.compat.versions import check_vllm_version
from vllm_lamina.config import AUTO, LaminaConfig
from vllm_lamina.device import device_for
from vllm_lamina.executor.placement import Placement, place
from vllm_lamina.support import check_engine_config
from vllm_lamina.units import format_bytes, format_cpus, parse_bytes
from vllm_lamina.worker.embedded import EmbeddedAttentionWorker
from vllm_lamina.worker.host import available_memory

logger = init_logger("vllm.lamina")

SHARE_OF_FREE_MEMORY = 0.7
"""Of the memory free once the model is loaded, what ``--lamina-memory auto`` gives to the KV pool."""


class _LaminaExecutor(Executor):
    """Starts the attention worker with the model worker, and ends it with the engine."""

    _attention_worker: EmbeddedAttentionWorker | None = None

    def _init_executor(self) -> None:
        check_vllm_version()
        check_engine_config(self.vllm_config)
        self.lamina_config = LaminaConfig.from_additional_config(self.vllm_config.additional_config)
        device_type = self.vllm_config.device_config.device_type
        self.parallel_config.worker_cls = device_for(device_type).worker_cls
        # What the user gave vLLM for the KV cache is the attention worker's; the model worker reserves nothing.
        self.kv_cache_memory_bytes = self.cache_config.kv_cache_memory_bytes
        self.cache_config.kv_cache_memory_bytes = 0
        self.placement = place(
            allowed=os.sched_getaffinity(0),
            worker_cpus=self.lamina_config.worker_cpus,
            bind=envs.VLLM_CPU_OMP_THREADS_BIND,
            model_on_cpu=device_type == "cpu",
        )
        self._init_model_workers(self.placement)
        try:
            self.collective_rpc(
                "attach_attention_worker", args=(self._attention_worker_address(), self.placement.shared)
            )
        except BaseException:
            self.shutdown()
            raise

    def _init_model_workers(self, placement: Placement) -> None:
        raise NotImplementedError

    def _attention_worker_address(self) -> str:
        if self.lamina_config.workers:
            return self.lamina_config.workers
        cpus = self.placement.worker_cpus
        if self.placement.shared:
            logger.warning(
                "Lamina: the attention worker (CPUs %s) and the model worker share CPUs; both will be slower. Choose "
                "disjoint ones with --lamina-worker-cpus and VLLM_CPU_OMP_THREADS_BIND.",
                format_cpus(cpus),
            )
        memory = self._embedded_memory()
        self._attention_worker = EmbeddedAttentionWorker.start(memory, list(cpus))
        logger.info(
            "Lamina: attention worker started, pid %d, CPUs %s, KV pool %s.",
            self._attention_worker.pid,
            format_cpus(cpus),
            format_bytes(memory),
        )
        return self._attention_worker.address

    def _embedded_memory(self) -> int:
        if self.lamina_config.memory != AUTO:
            return parse_bytes(self.lamina_config.memory)
        return self.kv_cache_memory_bytes or int(SHARE_OF_FREE_MEMORY * available_memory())

    def shutdown(self) -> None:
        """End the model worker, then the attention worker."""
        super().shutdown()
        if self._attention_worker is not None:
            self._attention_worker.stop()
            self._attention_worker = None

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return False


class LaminaExecutor(_LaminaExecutor, MultiprocExecutor):
    """The model worker is a process of its own, as in vLLM's normal mode."""

    supports_pp = False

    def _init_model_workers(self, placement: Placement) -> None:
        if placement.model_cpus is None:
            MultiprocExecutor._init_executor(self)
            return
        with model_workers_bound_to(placement.model_cpus):
            MultiprocExecutor._init_executor(self)


class LaminaUniProcExecutor(_LaminaExecutor, UniProcExecutor):
    """The model worker is part of the engine's process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``)."""

    _process_on: ThisProcessOn | None = None
    driver_worker: Any = None

    def _init_model_workers(self, placement: Placement) -> None:
        if placement.model_cpus is not None:
            self._process_on = ThisProcessOn(placement.model_cpus)
        UniProcExecutor._init_executor(self)

    def shutdown(self) -> None:
        """End the workers and give this process its CPUs back."""
        super().shutdown()
        if self._process_on is not None:
            self._process_on.restore()
            self._process_on = None
