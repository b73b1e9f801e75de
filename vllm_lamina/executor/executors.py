"""Executors that run vLLM's model worker beside an attention worker: with worker processes, and in one process."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import vllm.envs as envs
from vllm.logger import init_logger
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_lamina._native import create_turn_log
from vllm_lamina.compat.config import facts_of, with_batches_in_flight
from vllm_lamina.compat.outputs import NOTHING_TO_DO
from vllm_lamina.compat.scheduled import has_work
from vllm_lamina.compat.threads import ThisProcessOn, model_workers_bound_to
from vllm_lamina.compat.versions import check_vllm_version
from vllm_lamina.config import LaminaConfig
from vllm_lamina.device import device_for
from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.cpus import CpuPlacement, place
from vllm_lamina.executor.parent import end_with_parent
from vllm_lamina.executor.preflight import settle
from vllm_lamina.executor.recovery import Recovery
from vllm_lamina.executor.sources import source_for
from vllm_lamina.executor.sources.base import AttentionWorkerSource
from vllm_lamina.host import available_memory
from vllm_lamina.support import check_engine_config
from vllm_lamina.units import format_bytes

logger = init_logger("vllm.lamina")

STEP_METHODS = ("execute_model", "sample_tokens")
"""The model worker's methods that a step consists of."""


def check_states_fit(state_bytes: int, max_num_seqs: int) -> None:
    """States that the model workers will hold must fit the memory that their model leaves. Raises ConfigError."""
    free = available_memory()
    if state_bytes > free:
        raise ConfigError(
            f"the states of --max-num-seqs {max_num_seqs} requests take {format_bytes(state_bytes)} beside the model, "
            f"and {format_bytes(free)} are free: choose a smaller --max-num-seqs"
        )


class _LaminaExecutor(Executor):
    """Starts the attention workers with the model workers, and ends them with the engine."""

    _recovery: Recovery | None = None
    _source: AttentionWorkerSource | None = None

    def _init_executor(self) -> None:
        check_vllm_version()
        settle(self.vllm_config)
        check_engine_config(self.vllm_config)
        self.lamina_config = LaminaConfig.from_additional_config(self.vllm_config.additional_config)
        device_type = self.vllm_config.device_config.device_type
        self.parallel_config.worker_cls = device_for(device_type).worker_cls
        self._source = source = source_for(self.vllm_config, self.lamina_config)
        # What the user gave vLLM for the KV cache is the attention worker's; the model worker reserves nothing.
        self.cache_config.kv_cache_memory_bytes = 0
        self.placement = place(
            allowed=os.sched_getaffinity(0),
            worker_cpus=self.lamina_config.worker_cpus,
            bind=envs.VLLM_CPU_OMP_THREADS_BIND,
            model_on_cpu=device_type == "cpu",
            num_ranks=self.parallel_config.tensor_parallel_size,
        )
        with_batches_in_flight(self.vllm_config, self.lamina_config.batches)
        with self._ending_on_failure():
            self._init_model_workers(self.placement)
            state_bytes = sum(self.collective_rpc("state_bytes"))
            check_states_fit(state_bytes, self.scheduler_config.max_num_seqs)
            addresses = source.start(self.placement, state_bytes)
            self._tell_attention_workers(addresses)
            self.collective_rpc("attach_attention_workers", args=(addresses, self.placement.shared))
            self._recovery = Recovery(
                self.collective_rpc,
                addresses,
                spares=self.lamina_config.spare_addresses,
                timeout=self.lamina_config.recovery_timeout,
                restart=source.restart,
                secret_file=self.lamina_config.secret_file,
                on_change=self._tell_attention_workers,
            )
            if self.lamina_config.batches > 1 and self.parallel_config.tensor_parallel_size > 1:
                self._share_turns()

    def collective_rpc(
        self, method: str | Callable[..., Any], timeout: float | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a method of the model workers as vLLM does, with no step in flight unless it is a part of a step.

        Every call of vLLM's and its users' comes through here. Any may write what the lanes' threads read, such as the
        model's weights: so all steps begun before it are over, and those begun later see all that it did.
        """
        if method not in STEP_METHODS:
            self._finish_steps(timeout)
        return super().collective_rpc(method, timeout, *args, **kwargs)

    def _finish_steps(self, timeout: float | None = None) -> None:
        super().collective_rpc("finish_steps", timeout)

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
        """Let the attention workers allocate the KV cache, and the scheduler know where its blocks are."""
        with self._ending_on_failure():
            super().initialize_from_config(kv_cache_configs)
            placement, *others = self.collective_rpc("block_placement")
            if any(other != placement for other in others):
                raise ConfigError(
                    "each rank of the model needs attention workers with the same --memory, in the same order, to "
                    f"place KV blocks alike; the ranks have {placement}, {', '.join(map(str, others))}: change "
                    "--memory, or choose --lamina-partition head"
                )
            facts_of(self.vllm_config).block_placement = placement
            facts_of(self.vllm_config).state_blocks = self.collective_rpc("state_blocks")[0]
            facts_of(self.vllm_config).finish_steps = self._finish_steps
            assert self._recovery is not None
            self._recovery.goes_on_without_some = placement is not None
            facts_of(self.vllm_config).recovery = self._recovery

    def _tell_attention_workers(self, addresses: Sequence[Sequence[str]]) -> None:
        facts_of(self.vllm_config).attention_workers = addresses

    @abc.abstractmethod
    def _init_model_workers(self, placement: CpuPlacement) -> None:
        """Start the model workers and let them load the model."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Let the model worker run a step; a step in which it has nothing to do does not reach it."""
        if non_block and not has_work(scheduler_output):
            nothing: Future[Any] = Future()
            nothing.set_result(NOTHING_TO_DO)
            return nothing
        return super().execute_model(scheduler_output, non_block)

    def _share_turns(self) -> None:
        turn_log = create_turn_log()
        try:
            self.collective_rpc("share_turns", args=(f"/proc/{os.getpid()}/fd/{turn_log}",))
        finally:
            os.close(turn_log)

    def shutdown(self) -> None:
        """End the model workers, then the attention workers."""
        if self._recovery is not None:
            self._recovery.stop()
        source, self._source = self._source, None
        if source is not None:
            source.leave()
        super().shutdown()
        if source is not None:
            source.close()

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return False


class LaminaExecutor(_LaminaExecutor, MultiprocExecutor):
    """Each model worker is a process of its own, as in vLLM's normal mode."""

    supports_pp = False

    def _init_model_workers(self, placement: CpuPlacement) -> None:
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

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Several ranks have processes of their own in any case, as in vLLM."""
        if vllm_config.parallel_config.world_size > 1:
            return LaminaExecutor(vllm_config, *args, **kwargs)
        return super().__new__(cls)

    def _init_model_workers(self, placement: CpuPlacement) -> None:
        if placement.model_cpus is not None:
            self._process_on = ThisProcessOn(placement.model_cpus[0])
        UniProcExecutor._init_executor(self)

    def shutdown(self) -> None:
        """End the workers and give this process its CPUs back."""
        super().shutdown()
        self.driver_worker = None  # it would take its backend from the next engine if it were ended again
        if self._process_on is not None:
            self._process_on.restore()
            self._process_on = None
