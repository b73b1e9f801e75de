"""Times the operators of a decode step and what crosses the network between them: q, k, v and the output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vllm_lamina.config import SEQUENCE
from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.devices import Array, Collective, Device, Transport
from vllm_lamina.planner.models import Model

MEMORY_UTILISATION = 0.9
"""Fraction of a device's memory that weights and KV cache may fill; vLLM's default ``--gpu-memory-utilization``."""


@dataclass(frozen=True)
class ComputeGroup:
    """Devices that run the non-attention operators together with tensor parallelism.

    Attributes
    ----------
    device, tensor_parallel
        What and how many.
    collective
        Cost of the two all-reduces of each layer.
    """

    model: Model
    device: Device
    tensor_parallel: int
    collective: Collective

    def matrix_time(self, tokens: ArrayLike) -> Array:
        """Seconds of the matrix products of a step over `tokens` tokens.

        ``MTIME(B) = max(2NB / F, (eN + 2eBd) / M)`` (arXiv 2405.01814, section 2), with F and M multiplied by the
        devices and by the fractions they reach, and for MoE with the experts in eN that the batch is expected to
        touch.
        """
        batch = np.asarray(tokens, dtype=np.float64)
        efficiency, model = self.device.efficiency, self.model
        peak_flops = self.tensor_parallel * self.device.flops
        peak_bandwidth = self.tensor_parallel * self.device.memory_bandwidth
        compute = 2.0 * model.active_params * batch / (peak_flops * efficiency.gemm_mfu.at(batch))
        activations = 2.0 * model.bytes_per_element * batch * model.hidden
        memory = (model.streamed_bytes(batch) + activations) / (
            peak_bandwidth * efficiency.weight_mbu.at(batch)
        )
        return np.maximum(compute, memory)

    def non_attention_time(self, tokens: ArrayLike) -> Array:
        """Seconds of all non-attention operators: matrix products, all-reduces and the software's overheads."""
        batch = np.asarray(tokens, dtype=np.float64)
        efficiency = self.device.efficiency
        overhead = efficiency.step_overhead + self.model.layers * efficiency.layer_overhead
        return (
            self.matrix_time(batch)
            + self.all_reduce_time(batch)
            + overhead
            + batch * efficiency.sequence_overhead
        )

    def all_reduce_time(self, tokens: ArrayLike) -> Array:
        """Seconds of the two all-reduces per layer.

        Each costs a latency, and ``2 (a - 1) / a`` times the hidden state's bytes on the link (ring).
        """
        batch = np.asarray(tokens, dtype=np.float64)
        if self.tensor_parallel == 1:
            return np.zeros_like(batch)
        model, parts = self.model, self.tensor_parallel
        moved = 2.0 * (parts - 1) / parts * batch * model.hidden * model.bytes_per_element
        rate = self.device.link_bandwidth * self.collective.utilisation
        return 2.0 * model.layers * (self.collective.latency + moved / rate)

    def prefill_attention_time(self, chunk: float, context: float) -> float:
        """Seconds of attention of a chunk of prompt tokens over `context` earlier ones and, causally, itself."""
        mfu = float(self.device.efficiency.gemm_mfu.at(chunk))
        flops = self.model.prompt_attention_flops(chunk, context)
        return flops / (self.tensor_parallel * self.device.flops * mfu)

    @property
    def memory_for_kv(self) -> float:
        """Bytes that the weights leave for a KV cache; negative if the weights do not fit."""
        return MEMORY_UTILISATION * self.tensor_parallel * self.device.memory_bytes - self.model.weight_bytes

    def check_tensor_parallel(self) -> None:
        """Refuse a tensor-parallel size that the model or the device's links cannot do.

        Raises
        ------
        ConfigError
            The heads do not divide, or the device has no link to its neighbours.
        """
        size, model, device = self.tensor_parallel, self.model, self.device
        for kind in model.attention:
            if size < 1 or kind.heads % size or (kind.kv_heads % size and size % kind.kv_heads):
                raise ConfigError(
                    f"tensor parallel size {size} does not divide the {kind.heads} heads ({kind.kv_heads} KV heads) of "
                    f"{model.name}"
                )
        if size > 1 and device.link_bandwidth <= 0:
            raise ConfigError(
                f"{device.key} ({device.name}) has no link for tensor parallelism; set link_gbs"
            )

    def why_it_does_not_fit(self) -> str:
        """Say how much memory the weights need, and have."""
        usable = MEMORY_UTILISATION * self.device.memory_bytes
        return (
            f"the weights of {self.model.name} ({self.model.weight_bytes / 1e9:.1f} GB) do not fit on "
            f"{self.tensor_parallel} x {self.device.name} ({self.tensor_parallel * usable / 1e9:.0f} GB usable); "
            f"it takes at least {int(-(-self.model.weight_bytes // usable))}"
        )


def attention_time_per_token(model: Model, device: Device, workers: int, sequences: ArrayLike) -> Array:
    """Seconds of the attention operator, all layers, per cached token of a batch that all of them see.

    ``ATIME(B, l) = 2 e d L B l / (G M)`` (arXiv 2405.01814, section 2) divided by the B l cached tokens, or the
    compute of the same tokens where that binds.

    Parameters
    ----------
    workers
        Devices that share the work evenly.
    sequences
        B, which sets the efficiency. [any shape]
    """
    efficiency = device.efficiency
    batch = np.asarray(sequences, dtype=np.float64)
    memory = model.read_bytes_per_token / (
        workers * device.memory_bandwidth * efficiency.attention_mbu.at(batch)
    )
    compute = model.attention_flops_per_cached_token / (
        workers * device.flops * efficiency.attention_mfu.at(batch)
    )
    return np.maximum(memory, compute)


@dataclass(frozen=True)
class Wire:
    """The network between one group of model workers and the attention workers.

    Attributes
    ----------
    transport
        Latency and utilisation.
    model_bandwidth, attention_bandwidth
        Bytes/s, one way, of all NICs of one model replica and of all attention workers.
    attention_workers, partition
        A sequence partition sends q to, and gets a partial output from, every worker.
    replicas
        Model replicas that share the attention workers. With several, the hidden state moves to the next replica
        after each layer.
    """

    model: Model
    transport: Transport
    model_bandwidth: float
    attention_bandwidth: float
    attention_workers: int
    partition: str
    replicas: int = 1

    @property
    def rate(self) -> float:
        """Bytes/s, one way, of one batch's large messages."""
        return min(self.model_bandwidth, self.attention_bandwidth) * self.transport.utilisation

    @property
    def _copies(self) -> int:
        return self.attention_workers if self.partition == SEQUENCE else 1

    @property
    def query_bytes(self) -> float:
        """Bytes of q of one token, all layers."""
        return float(self.model.query_bytes_per_token * self._copies)

    @property
    def output_bytes(self) -> float:
        """Bytes of the output of one token, all layers; no more than q."""
        return float(self.model.output_bytes_per_token * self._copies)

    @property
    def residual_bytes(self) -> float:
        """Bytes of hidden state of one token that move between model replicas, all layers."""
        model = self.model
        moved = model.layers * model.hidden * model.bytes_per_element
        return float(moved) if self.replicas > 1 else 0.0

    def query_time(self, tokens: ArrayLike) -> Array:
        """Seconds that q of so many tokens takes, and then their output, all layers."""
        return np.asarray(tokens, dtype=np.float64) * (self.query_bytes + self.output_bytes) / self.rate

    def key_value_time(self, tokens: ArrayLike) -> Array:
        """Seconds that k and v take, all layers."""
        return np.asarray(tokens, dtype=np.float64) * self.model.kv_bytes_per_token / self.rate

    def busy_time(self, tokens: ArrayLike) -> Array:
        """Seconds that one batch occupies the busier side's NICs, in the busier direction.

        q, k and v leave the replicas, beside the hidden state, and enter the attention workers.
        """
        sent = self.query_bytes + self.model.kv_bytes_per_token
        replicas = (sent + self.residual_bytes) / (self.replicas * self.model_bandwidth)
        workers = sent / self.attention_bandwidth
        return np.asarray(tokens, dtype=np.float64) * (max(replicas, workers) / self.transport.utilisation)

    def exposed_time(self, tokens: ArrayLike) -> Array:
        """Seconds that one batch waits for the wire if nothing overlaps.

        That is q, k and v, then the output, and a round trip's latency per layer; a hidden state that changes
        replicas travels while attention runs.
        """
        latency = self.model.layers * self.transport.round_trip
        return self.query_time(tokens) + self.key_value_time(tokens) + latency
