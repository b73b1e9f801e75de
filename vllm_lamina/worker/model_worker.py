"""vLLM's worker without a KV cache of its own: the KV blocks it reports are those of the attention worker."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import msgspec
import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.compat.backends import override_attention_backend, restore_attention_backend
from vllm_lamina.compat.output_thread import output_thread_started, request_output_thread
from vllm_lamina.config import LaminaConfig
from vllm_lamina.device import device_for
from vllm_lamina.errors import LaminaError, UnsupportedError
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.messages import DType, Geometry
from vllm_lamina.units import format_bytes
from vllm_lamina.worker.capacity import check_holds_one_request
from vllm_lamina.worker.lanes import Lane, Lanes

logger = init_logger("vllm.lamina")

BACKEND = "vllm_lamina.attention_backend.LaminaAttentionBackend"

DTYPE_NAMES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

SPIN_US = 2000
"""How long a side polls before it sleeps, where its CPUs are its own: longer than the other side's part of a layer."""


class _LaminaWorker(Worker):
    """What Lamina changes in vLLM's worker, whatever the device."""

    _connection: AttentionWorkerConnection | None = None
    _lanes: Lanes | None = None

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.lamina_config = LaminaConfig.from_additional_config(vllm_config.additional_config)
        device = device_for(vllm_config.device_config.device_type)
        self.exchange = Exchange(device, self.lamina_config.timeout).activate()
        override_attention_backend(device.backend_name, BACKEND)
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model as vLLM does."""
        super().load_model(*args, **kwargs)
        if self.lamina_config.batches > 1:
            request_output_thread(self.vllm_config)

    def attach_attention_worker(self, address: str, shares_cpus: bool) -> None:
        """Connect to the attention worker. Called by the executor once the model is loaded."""
        output_thread_started(self.vllm_config)
        self._connection = AttentionWorkerConnection.connect(address)
        self._spin_us = 0 if shares_cpus else SPIN_US

    @property
    def connection(self) -> AttentionWorkerConnection:
        """The attention worker. Raises LaminaError before `attach_attention_worker`."""
        if self._connection is None:
            raise LaminaError("The model worker is not connected to an attention worker yet.")
        return self._connection

    def determine_available_memory(self) -> int:
        """Bytes of KV cache as vLLM counts them that the attention worker's pool holds."""
        self._warm_up()
        specs = self.get_kv_cache_spec()
        geometry = self._geometry(specs)
        block_bytes = self.connection.block_bytes(geometry)
        num_blocks = self.connection.pool_bytes // block_bytes
        if self.model_config.original_max_model_len != -1:  # with -1 vLLM fits the length to the pool
            check_holds_one_request(
                self.connection.pool_bytes, block_bytes, geometry.block_size, self.model_config.max_model_len
            )
        # vLLM divides by its own page size, which knows nothing of the padding in the attention worker's layout.
        return num_blocks * int(sum(spec.page_size_bytes for spec in specs.values()))

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Let the attention worker allocate its pool; the model worker's layers keep empty KV caches."""
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise UnsupportedError(
                "Lamina does not support models whose layers need different kinds of KV cache."
            )
        layer_names = kv_cache_config.kv_cache_groups[0].layer_names
        specs = self.get_kv_cache_spec()
        geometry = self._geometry({name: specs[name] for name in layer_names})
        used = self.connection.configure(
            geometry,
            kv_cache_config.num_blocks,
            ring_bytes=self._ring_bytes(geometry),
            spin_us=self._spin_us,
            worker_spin_us=self._spin_us,
        )
        self.exchange.open(self.connection.client, layer_names)
        kv_cache_config = dataclasses.replace(kv_cache_config, kv_cache_tensors=[])
        super().initialize_from_config(kv_cache_config)
        if self.lamina_config.batches > 1:
            self._lanes = self._make_lanes(self.lamina_config.batches, kv_cache_config)
        local = sum(tensor.numel() * tensor.element_size() for tensor in self.model_runner.kv_caches)
        logger.info(
            "Lamina: KV cache of %s on the attention worker (%d blocks, %d tokens); %s on the model worker.",
            format_bytes(used),
            kv_cache_config.num_blocks,
            kv_cache_config.num_blocks * geometry.block_size,
            format_bytes(local),
        )

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the step; blocks that it zeroes or copies are zeroed and copied on the attention worker."""
        zero, copies = scheduler_output.new_block_ids_to_zero, scheduler_output.kv_cache_block_copies
        if zero:
            self.exchange.client.zero_blocks(np.asarray(zero, np.int32), self.exchange.timeout)
        if copies:
            self.exchange.client.copy_blocks(np.asarray(copies, np.int32), self.exchange.timeout)
        if zero or copies:
            scheduler_output = dataclasses.replace(
                scheduler_output, new_block_ids_to_zero=None, kv_cache_block_copies=None
            )
        if self._lanes is not None:
            return self._lanes.execute_model(scheduler_output)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample the tokens of the step begun last."""
        if self._lanes is not None:
            return self._lanes.sample_tokens(grammar_output)
        return super().sample_tokens(grammar_output)

    def attention_worker_stats(self) -> dict[str, Any]:
        """Counters of the attention worker, by the names of `WorkerStats`; plain data, since it crosses processes."""
        return msgspec.structs.asdict(self.connection.stats())

    def shutdown(self) -> None:
        """Leave the attention worker, and vLLM's registry of backends as it was."""
        if self._lanes is not None:
            self._lanes.stop()
            self._lanes = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.exchange.deactivate()
        restore_attention_backend(self.exchange.device.backend_name)
        super().shutdown()

    def _warm_up(self) -> None:
        """Compile the model, where the device's worker does so before the KV cache exists."""

    def _make_lanes(self, num_lanes: int, kv_cache_config: KVCacheConfig) -> Lanes:
        """The first lane has vLLM's model runner; the others' share its weights and its request states."""
        first = self.model_runner
        runners = [first]
        while len(runners) < num_lanes:
            with set_current_vllm_config(self.vllm_config):
                runner = type(first)(self.vllm_config, self.device)
                runner.model = first.model
                runner.requests = first.requests
                runner.num_prompt_logprobs = first.num_prompt_logprobs
                runner.initialize_kv_cache(kv_cache_config)
            runners.append(runner)
        for index, runner in enumerate(runners):
            for group in itertools.chain.from_iterable(runner.attn_groups):
                group.get_metadata_builder().lane = index
        client, timeout = self.exchange.client, self.exchange.timeout
        return Lanes([Lane(index, runner, client, timeout) for index, runner in enumerate(runners)])

    def _geometry(self, specs: dict[str, KVCacheSpec]) -> Geometry:
        kinds = {
            (type(spec), spec.block_size, spec.num_kv_heads, spec.head_size, spec.dtype)
            for spec in specs.values()
        }
        layers = [self._layer(name) for name in specs]
        heads = {layer.num_heads for layer in layers}
        if len(kinds) != 1 or len(heads) != 1:
            raise UnsupportedError(
                f"Lamina does not support models whose attention layers differ in kind or shape: {kinds}."
            )
        spec = next(iter(specs.values()))
        if (
            type(spec) is not FullAttentionSpec
            or getattr(spec, "head_size_v", spec.head_size) != spec.head_size
        ):
            raise UnsupportedError(f"Lamina supports full attention only; this model's KV cache is {spec}.")
        return Geometry(
            num_layers=len(specs),
            block_size=spec.block_size,
            num_heads=heads.pop(),
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            dtype=DTYPE_NAMES[spec.dtype],
            scales=tuple(layer.impl.scale for layer in layers),
        )

    def _layer(self, name: str) -> Any:
        return self.vllm_config.compilation_config.static_forward_context[name]

    def _ring_bytes(self, geometry: Geometry) -> int:
        """Room for two of the largest frames: one layer's q, k and v of a full step."""
        element = 4 if geometry.dtype == "float32" else 2
        budget: int = self.scheduler_config.max_num_batched_tokens
        row = (geometry.num_heads + 2 * geometry.num_kv_heads) * geometry.head_size * element
        layer = budget * row
        blocks = -(-self.model_config.max_model_len // geometry.block_size)
        step: int = self.scheduler_config.max_num_seqs * (blocks * 4 + 64) + 8 * budget
        return 2 * (layer + step) + (1 << 20)


class LaminaCPUWorker(_LaminaWorker, CPUWorker):
    """The model worker on a CPU."""

    def _warm_up(self) -> None:
        if self._should_warm_up_model():
            self.model_runner.warming_up_model()


class LaminaCUDAWorker(_LaminaWorker):
    """The model worker on a CUDA GPU. Written against vLLM 0.32's interfaces and NOT RUN yet."""

    def _warm_up(self) -> None:
        self.model_runner.profile_run()
