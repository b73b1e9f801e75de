"""Executors that run vLLM's model worker beside an attention worker: with worker processes, and in one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from vllm_lamina.compat.config import with_batches_in_flight
from vllm_lamina.compat.threads import ThisProcessOn, model_workers_bound_to
from vllm_lamina.compat.versions import check_vllm_version
from vllm_lamina.config import AUTO, LaminaConfig
from vllm_lamina.device import device_for
from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.parent import end_with_parent
from vllm_lamina.executor.placement import Placement, place
from vllm_lamina.support import check_engine_config
from vllm_lamina.units import format_bytes, format_cpus, parse_bytes
from vllm_lamina.worker.embedded import EmbeddedAttentionWorker
from vllm_lamina.worker.host import available_memory

logger = init_logger("vllm.lamina")

SCHEDULER = "vllm_lamina.scheduler.staggered.StaggeredScheduler"

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
        self._stagger(self.lamina_config.batches)
        with self._ending_on_failure():
            self._init_model_workers(self.placement)
            self.collective_rpc(
                "attach_attention_worker", args=(self._attention_worker_address(), self.placement.shared)
            )

    @contextlib.contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """Give back what was taken if the engine does not get ready: vLLM forgets such an engine, but this process,
        and with it the attention worker, may live on.
        """
        try:
            yield
        except BaseException:
            self.shutdown()
            raise

    def determine_available_memory(self) -> list[int]:
        """Bytes of KV cache of each model worker, as vLLM counts them."""
        with self._ending_on_failure():
            available: list[int] = super().determine_available_memory()
            return available

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        """Let the attention worker allocate the KV cache."""
        with self._ending_on_failure():
            super().initialize_from_config(kv_cache_configs)

    def _stagger(self, num_batches: int) -> None:
        if num_batches == 1:
            return
        if self.scheduler_config.scheduler_cls is not None:
            raise ConfigError(
                "two batches in flight need Lamina's own scheduler; remove --scheduler-cls or use --lamina-batches 1"
            )
        self.scheduler_config.scheduler_cls = SCHEDULER
        with_batches_in_flight(self.vllm_config, num_batches)

    def _init_model_workers(self, placement: Placement) -> None:
        raise NotImplementedError

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Let the model worker run a step; a step in which it has nothing to do does not reach it."""
        if (
            scheduler_output.total_num_scheduled_tokens == 0
            and not scheduler_output.finished_req_ids
            and non_block
        ):
            nothing: Future[Any] = Future()
            nothing.set_result(EMPTY_MODEL_RUNNER_OUTPUT)
            return nothing
        return super().execute_model(scheduler_output, non_block)

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
        end_with_parent()
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
        self.driver_worker = None  # it would take its backend from the next engine if it were ended again
        if self._process_on is not None:
            self._process_on.restore()
            self._process_on = None
