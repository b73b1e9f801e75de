"""vLLM's worker without a KV cache of its own: the KV blocks it reports are those of the attention workers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_lamina._native import AttentionClient, ChannelClosed, ChannelTimeout
from vllm_lamina.attention_backend import LaminaAttentionBackend, LaminaLatentBackend
from vllm_lamina.attention_backend.exchange import Exchange, Layers
from vllm_lamina.attention_backend.host_layers import HostLayers
from vllm_lamina.attention_backend.streamed_layers import StreamedLayers
from vllm_lamina.compat.attention import implementations, settle_layers
from vllm_lamina.compat.backends import (
    NAMED_BY_MODELS,
    override_attention_backend,
    restore_attention_backend,
)
from vllm_lamina.compat.geometry import counted_bytes, geometry_of_layers, groups_of, kv_groups
from vllm_lamina.compat.kv_cache import (
    allocated_bytes,
    expect_no_kv,
    fits_length_to_pool,
    warm_up_on_cpu,
    without_tensors,
)
from vllm_lamina.compat.latent_attention import BACKENDS as LATENT_BACKENDS
from vllm_lamina.compat.output_thread import output_thread_started, request_output_thread
from vllm_lamina.compat.outputs import NOTHING_TO_DO, LaterOutput
from vllm_lamina.compat.runner import lane_runners
from vllm_lamina.compat.scheduled import read_step
from vllm_lamina.compat.states import States, expected_bytes
from vllm_lamina.config import HEAD, LaminaConfig
from vllm_lamina.device import device_for
from vllm_lamina.device.base import Chunks, Streams
from vllm_lamina.errors import LaminaError, UnsupportedError
from vllm_lamina.kv_cache.partition import Partition
from vllm_lamina.units import format_bytes
from vllm_lamina.worker.model_worker.attention_workers import AttentionWorkers, ChannelOptions
from vllm_lamina.worker.model_worker.lanes import Lanes

logger = init_logger("vllm.lamina")

BACKEND = "vllm_lamina.attention_backend.LaminaAttentionBackend"
LATENT_BACKEND = "vllm_lamina.attention_backend.LaminaLatentBackend"

SPIN_US = 2000
"""How long a side polls before it sleeps, where its CPUs are its own: longer than the other side's part of a layer."""


class _LaminaWorker(Worker):
    """What Lamina changes in vLLM's worker, whatever the device."""

    _attention_workers: AttentionWorkers | None = None
    _partition: Partition | None = None
    _lanes: Lanes | None = None
    _states = States()
    _turn_log: int | None = None
    _warms_up = False

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.lamina_config = LaminaConfig.from_additional_config(vllm_config.additional_config)
        device = device_for(vllm_config.device_config.device_type)
        self.exchange = Exchange(device, self.lamina_config.timeout).activate()
        for name in (device.backend_name, *NAMED_BY_MODELS):
            override_attention_backend(name, BACKEND)
        for name in LATENT_BACKENDS:
            override_attention_backend(name, LATENT_BACKEND)
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model as vLLM does, and refuse one that Lamina would compute as another.

        Raises
        ------
        UnsupportedError
            Names the layer and what it asks for.
        """
        super().load_model(*args, **kwargs)
        with set_current_vllm_config(self.vllm_config):
            settle_layers(self.vllm_config, LaminaAttentionBackend, LaminaLatentBackend)
        if self.lamina_config.batches > 1:
            request_output_thread(self.vllm_config)

    def attach_attention_workers(self, addresses_by_rank: Sequence[Sequence[str]], shares_cpus: bool) -> None:
        """Connect to the attention workers of this rank. Called by the executor once the model is loaded."""
        output_thread_started(self.vllm_config)
        self._attention_workers = AttentionWorkers.connect(
            addresses_by_rank[self.rank], secret_file=self.lamina_config.secret_file
        )
        self._spin_us = 0 if shares_cpus else SPIN_US

    def share_turns(self, turn_log: str) -> None:
        """Open the file by which all ranks' lanes take the same turns. Called by the executor if there are lanes."""
        self._turn_log = os.open(turn_log, os.O_RDWR | os.O_CLOEXEC)

    @property
    def attention_workers(self) -> AttentionWorkers:
        """The attention workers. Raises LaminaError before `attach_attention_workers`."""
        if self._attention_workers is None:
            raise LaminaError("The model worker is not connected to attention workers yet.")
        return self._attention_workers

    @property
    def lanes(self) -> Lanes:
        """The lanes. Raises LaminaError before `initialize_from_config`."""
        if self._lanes is None:
            raise LaminaError("The model worker has no KV cache yet.")
        return self._lanes

    def state_bytes(self) -> int:
        """Bytes that this model worker will allocate for states, about: vLLM has not grouped the layers yet."""
        return expected_bytes(self.vllm_config, self.get_kv_cache_spec())

    def determine_available_memory(self) -> int:
        """Bytes of KV cache as vLLM counts them that the attention workers' pools hold."""
        self._warm_up()
        groups = groups_of(self.vllm_config, self.get_kv_cache_spec())
        _, partition = self._divide(groups)
        if not fits_length_to_pool(self.model_config):
            sharing = self.lamina_config.ranks_sharing_memory(self.parallel_config.tensor_parallel_size)
            partition.check_holds_one_request(
                self.model_config.max_model_len,
                sharing,
                self.vllm_config.max_in_flight_tokens,
                spare_blocks=len(groups) - len(kv_groups(groups)),  # vLLM checks as if states took some
            )
        return counted_bytes(groups, partition.num_blocks)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Let the attention workers allocate their pools; layers of the model worker have states, and no KV."""
        num_blocks = kv_cache_config.num_blocks
        self._states = States.of(self.vllm_config, kv_cache_config.kv_cache_groups)
        layer_names, partition = self._divide(kv_cache_config.kv_cache_groups)
        self._partition = partition = partition.limited_to(num_blocks)
        streams = self.exchange.device.streams()
        options = ChannelOptions(
            max_tokens=self.scheduler_config.max_num_batched_tokens,
            max_requests=self.scheduler_config.max_num_seqs,
            max_model_len=self.model_config.max_model_len,
            spin_us=self._spin_us,
            transport=self.lamina_config.transport,
            heartbeat_timeout=self.lamina_config.heartbeat_timeout,
            num_streams=self.lamina_config.batches if streams else 0,
        )
        client, used = self.attention_workers.configure(partition, options)
        if self._turn_log is not None:
            client.share_turns(self._turn_log, self.rank)
        layers = self._layers(client, streams, partition, options)
        self.attention_workers.replace_channel = layers.replace_channel
        self.exchange.open(layers, layer_names, partition.geometry)
        kv_cache_config = without_tensors(kv_cache_config, self.vllm_config)
        expect_no_kv(self.model_runner)
        super().initialize_from_config(self._states.added_to(kv_cache_config))
        self.cache_config.num_gpu_blocks = num_blocks  # not those of states
        runners = lane_runners(
            self.model_runner, self.lamina_config.batches, self.vllm_config, kv_cache_config
        )
        kept = kv_groups(kv_cache_config.kv_cache_groups)
        self._lanes = Lanes(runners, self.exchange, client, kept, answers=self.rank == 0)
        workers = len(partition.shares)
        divided = f", divided by {partition.kind} ({partition.reason})" if workers > 1 else ""
        logger.info(
            "Lamina: KV cache of %s on %d attention worker%s%s: %d blocks, %d tokens; %s on the model worker%s.",
            format_bytes(used),
            workers,
            "s" if workers > 1 else "",
            divided,
            partition.num_blocks,
            partition.num_tokens(self.model_config.max_model_len, self.vllm_config.max_in_flight_tokens),
            format_bytes(allocated_bytes(self.model_runner)),
            f": states of {self.scheduler_config.max_num_seqs} requests" if self._states.num_blocks else "",
        )

    def compile_or_warm_up_model(self) -> Any:
        """Warm up as vLLM does. The steps that it makes by hand are none of a lane's, and name KV blocks of others: the
        first runner runs them and attends nothing, and the attention workers hear nothing of them.
        """
        self._warms_up = True
        try:
            return self.lanes.warm_up(super().compile_or_warm_up_model)
        finally:
            self._warms_up = False

    def block_placement(self) -> tuple[str, list[int]] | None:
        """How the scheduler has to place blocks: the partition, and the number of blocks of each worker.

        None where blocks are the same on all workers, and there is nothing to place.
        """
        partition = self._partition
        if partition is None or partition.kind == HEAD:
            return None
        return partition.kind, partition.blocks_per_worker

    def state_blocks(self) -> int:
        """How many blocks hold states on the model worker."""
        return self._states.num_blocks

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the step; blocks that it zeroes or copies are zeroed and copied on the attention workers."""
        if self._warms_up:
            return super().execute_model(scheduler_output)
        step = read_step(scheduler_output)
        with contextlib.suppress(ChannelClosed, ChannelTimeout):  # of a lost worker: the step will show it
            if step.blocks_to_zero:
                ids = np.asarray(step.blocks_to_zero, np.int32)
                self.attention_workers.client.zero_blocks(ids, self.exchange.timeout)
            if step.blocks_to_copy:
                pairs = np.asarray(step.blocks_to_copy, np.int32)
                self.attention_workers.client.copy_blocks(pairs, self.exchange.timeout)
        with self.annotate_profile(scheduler_output):
            self.lanes.execute(step)
        return None if step.num_tokens else NOTHING_TO_DO

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample the tokens of the step begun last."""
        if self._warms_up:
            return super().sample_tokens(grammar_output)
        return LaterOutput(self.lanes.sample(grammar_output))

    def finish_steps(self) -> None:
        """Wait until no step is in flight: before every call beside the steps, see the executor's `collective_rpc`."""
        if self._lanes is not None:
            self._lanes.finish_steps()

    def lost_attention_workers(self) -> list[int]:
        """Attention workers of this rank that are lost, by their place in the partition."""
        return self.attention_workers.lost

    def replace_attention_workers(
        self, candidates_by_rank: Sequence[Mapping[int, Sequence[str]]]
    ) -> dict[int, str]:
        """See `AttentionWorkers.replace`; called by the executor when no step is in flight."""
        return self.attention_workers.replace(candidates_by_rank[self.rank])

    def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter in its slot.

        Raises
        ------
        UnsupportedError
            There are two batches: the scheduler does not know of a pinned adapter, so the one that would have to make
            room might be in use by the other batch.
        """
        if len(self.lanes) > 1:
            raise UnsupportedError("LoRA adapters can be pinned with one batch only: use --lamina-batches 1.")
        return bool(super().pin_lora(lora_id))

    def attention_worker_stats(self) -> list[dict[str, Any]]:
        """Counters of each attention worker, see `AttentionWorkers.stats`."""
        return self.attention_workers.stats()

    def shutdown(self) -> None:
        """Leave the attention workers, and vLLM's registry of backends as it was."""
        if self._lanes is not None:
            self._lanes.stop()
            self._lanes = None
        if self._attention_workers is not None:
            self._attention_workers.close()
            self._attention_workers = None
        if self._turn_log is not None:
            os.close(self._turn_log)
            self._turn_log = None
        self.exchange.deactivate()
        for name in (self.exchange.device.backend_name, *NAMED_BY_MODELS, *LATENT_BACKENDS):
            restore_attention_backend(name)
        super().shutdown()

    def _warm_up(self) -> None:
        """Compile the model, where the device's worker does so before the KV cache exists."""

    def _layers(
        self, client: AttentionClient, streams: Streams | None, partition: Partition, options: ChannelOptions
    ) -> Layers:
        timeout = self.lamina_config.timeout
        if streams is None:
            ranks_wait = self.parallel_config.tensor_parallel_size > 1
            return HostLayers(client, timeout, ranks_wait)
        return StreamedLayers(
            client, streams, partition, options.num_streams, options.max_tokens, options.spin_us, timeout
        )

    def _divide(self, groups: Sequence[Any]) -> tuple[Sequence[str], Partition]:
        """The attention layers, and how the workers divide what they keep."""
        names, geometry = geometry_of_layers(self.vllm_config, groups)
        length = self.model_config.max_model_len
        return names, self.attention_workers.divide(self.lamina_config.partition, geometry, length)


class LaminaCPUWorker(_LaminaWorker, CPUWorker):
    """The model worker on a CPU."""

    def _warm_up(self) -> None:
        warm_up_on_cpu(self)


class LaminaCUDAWorker(_LaminaWorker):
    """The model worker on a CUDA GPU. Written against vLLM 0.32 and 0.33, not run on a GPU yet."""

    def _warm_up(self) -> None:
        # vLLM's worker runs this under the same two; what it measures around it is the room for a KV cache.
        with torch.inference_mode(), set_current_vllm_config(self.vllm_config):
            self.model_runner.profile_run(randomize_inputs=self.randomize_dummy_inputs)
            self._warm_up_local_attention()

    def _warm_up_local_attention(self) -> None:
        """Attend chunks of zeros: FlashAttention 4 is compiled when it is first called, for one chunk and for several,
        for short ones and for long ones.
        """
        longest = min(self.scheduler_config.max_num_batched_tokens, self.model_config.max_model_len)
        for impl in implementations(self.vllm_config):
            shape = impl.shape
            for lengths in ([1], [1, 1], [longest], [1, longest - 1]):
                q, k, v = (
                    torch.zeros(sum(lengths), heads, size, dtype=shape.dtype, device=self.device)
                    for heads, size in (
                        (shape.num_heads, shape.head_size),
                        (shape.num_kv_heads, shape.head_size),
                        (shape.num_kv_heads, shape.head_size_v),
                    )
                )
                impl.attend_locally(q, k, v, Chunks(lengths, [0] * len(lengths)))
