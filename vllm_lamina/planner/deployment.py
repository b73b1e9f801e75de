"""Puts a model on machines: tensor-parallel vLLM, or model workers and attention workers, what they hold and cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_lamina.config import HEAD, REQUEST, SEQUENCE
from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.cost import MEMORY_UTILISATION, ComputeGroup, Wire, attention_time_per_token
from vllm_lamina.planner.devices import Array, Catalogue, Device, Transport
from vllm_lamina.planner.models import Model


@dataclass(frozen=True)
class Stages:
    """Seconds of the stages of a step, tabled by batch size: row B of each array is for B tokens.

    Attributes
    ----------
    model
        One model replica is busy. [B]
    attention
        One shard of the attention pool is busy, per cached token that all layers see, for B sequences on it. [B]
    wire
        The busier direction of the network is busy. [B]
    exposed
        A batch waits for the network if nothing overlaps. [B]
    hideable
        k, v projection and transfer, behind which attention over earlier tokens runs once q is sent. [B]
    prompt_wire
        Seconds that the wire is busy with k and v of one prompt token; nobody waits for them.
    """

    model: Array
    attention: Array
    wire: Array
    exposed: Array
    hideable: Array
    prompt_wire: float = 0.0

    def sequential(self, tokens: int, attention: float) -> float:
        """Seconds of a step whose batch meets no other batch, with `attention` seconds of attention."""
        hidden = min(attention, float(self.hideable[tokens]))
        return float(self.model[tokens]) + attention + float(self.exposed[tokens]) - hidden


class Deployment(ABC):
    """One engine: a model on devices."""

    model: Model
    compute: ComputeGroup

    lanes: int = 1
    """Batches in flight."""

    replicas: int = 1
    """Copies of the model that the batches take turns on."""

    shards: int = 1
    """Parts of the KV cache that fill and are read independently."""

    attention_on_model_worker: bool
    """Whether attention occupies the same devices as the other operators."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables, such as ``4 x h100`` or ``(2,4) h100+h20``."""

    @property
    @abstractmethod
    def shard_tokens(self) -> int:
        """Tokens of KV cache that one shard holds, if all layers keep them."""

    @abstractmethod
    def stages(self, max_tokens: int) -> Stages:
        """Table the stages of a step for 0 to `max_tokens` tokens."""

    @abstractmethod
    def device_counts(self) -> tuple[tuple[Device, int], ...]:
        """The devices to rent."""

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache in all."""
        return self.shards * self.shard_tokens

    def cost(self, price_set: str = "latest") -> float:
        """US dollars per hour."""
        return sum(count * device.price(price_set).usd for device, count in self.device_counts())


@dataclass(frozen=True)
class Baseline(Deployment):
    """Tensor-parallel vLLM: weights, KV cache and attention on the same devices, one batch."""

    compute: ComputeGroup

    attention_on_model_worker = True

    def __post_init__(self) -> None:
        self.compute.check_tensor_parallel()
        if self.compute.memory_for_kv < self.compute.model.kv_bytes_per_token:
            raise ConfigError(self.compute.why_it_does_not_fit())

    @property
    def model(self) -> Model:  # type: ignore[override]
        return self.compute.model

    @property
    def name(self) -> str:
        return f"{self.compute.tensor_parallel} x {self.compute.device.key}"

    @property
    def _kv_copies(self) -> float:
        # With more devices than KV heads, devices hold the same heads.
        return max(1.0, self.compute.tensor_parallel / self.model.kv_heads)

    @property
    def shard_tokens(self) -> int:
        return int(self.compute.memory_for_kv / (self.model.kv_bytes_per_token * self._kv_copies))

    def stages(self, max_tokens: int) -> Stages:
        batch = np.arange(max_tokens + 1, dtype=np.float64)
        none = np.zeros_like(batch)
        per_token = attention_time_per_token(
            self.model, self.compute.device, self.compute.tensor_parallel, batch
        )
        return Stages(self.compute.non_attention_time(batch), per_token * self._kv_copies, none, none, none)

    def device_counts(self) -> tuple[tuple[Device, int], ...]:
        return ((self.compute.device, self.compute.tensor_parallel),)


@dataclass(frozen=True)
class Lamina(Deployment):
    """Model workers and attention workers: DOP (a, b).

    Attributes
    ----------
    compute
        One model replica. a is its devices times the replicas.
    attention_device, attention_workers
        What holds the KV cache and runs attention, and b.
    transport
        The network between them.
    lanes
        n batches in flight: 1; 2, which take turns on one replica; or n on n - 1 replicas (rotational staggered
        pipelining, arXiv 2405.01814 v2, section 4).
    partition
        How attention workers share attention: KV heads of every request (``head``), whole requests (``request``), or
        stretches of every context (``sequence``).
    overlap
        Whether attention starts when q has arrived, before k and v.
    """

    compute: ComputeGroup
    attention_device: Device
    attention_workers: int
    transport: Transport
    lanes: int = 2
    partition: str = HEAD
    overlap: bool = True

    attention_on_model_worker = False

    def __post_init__(self) -> None:
        model, workers = self.compute.model, self.attention_workers
        self.compute.check_tensor_parallel()
        if self.partition not in (HEAD, REQUEST, SEQUENCE):
            raise ConfigError(f"partition must be {HEAD}, {REQUEST} or {SEQUENCE}, not {self.partition!r}")
        if workers < 1 or self.lanes < 1:
            raise ConfigError(f"attention workers and batches must be at least 1: {workers}, {self.lanes}")
        if self.partition == HEAD and not model.heads_divide_by(workers):
            heads = ", ".join(str(heads) for heads in sorted({kind.kv_heads for kind in model.attention}))
            raise ConfigError(
                f"{model.name} has {heads} KV heads, which {workers} attention workers cannot share evenly; "
                "choose a divisor, or another partition"
            )
        if self.compute.memory_for_kv < 0:
            raise ConfigError(self.compute.why_it_does_not_fit())
        for device in (self.compute.device, self.attention_device):
            if device.network_bandwidth <= 0:
                raise ConfigError(
                    f"{device.key} ({device.name}) has no network in the catalogue; set network_gbps"
                )

    @property
    def model(self) -> Model:  # type: ignore[override]
        return self.compute.model

    @property
    def replicas(self) -> int:  # type: ignore[override]
        return max(1, self.lanes - 1)

    @property
    def shards(self) -> int:  # type: ignore[override]
        return self.attention_workers if self.partition == REQUEST else 1

    @property
    def model_workers(self) -> int:
        """a: devices that hold weights."""
        return self.replicas * self.compute.tensor_parallel

    @property
    def name(self) -> str:
        devices = f"{self.compute.device.key}+{self.attention_device.key}"
        return f"({self.model_workers},{self.attention_workers}) {devices}, {self.lanes} batch{'es' * (self.lanes > 1)}"

    @property
    def shard_tokens(self) -> int:
        memory = MEMORY_UTILISATION * self.attention_workers * self.attention_device.memory_bytes
        return int(memory / self.shards / self.model.kv_bytes_per_token)

    @cached_property
    def wire(self) -> Wire:
        """The network between all replicas and all attention workers."""
        return Wire(
            model=self.model,
            transport=self.transport,
            model_bandwidth=self.compute.tensor_parallel * self.compute.device.network_bandwidth,
            attention_bandwidth=self.attention_workers * self.attention_device.network_bandwidth,
            attention_workers=self.attention_workers,
            partition=self.partition,
            replicas=self.replicas,
        )

    def stages(self, max_tokens: int) -> Stages:
        batch = np.arange(max_tokens + 1, dtype=np.float64)
        hideable = np.zeros_like(batch)
        if self.overlap:
            projection = self.model.key_value_projection_share * self.compute.matrix_time(batch)
            hideable = projection + self.wire.key_value_time(batch)
        return Stages(
            model=self.compute.non_attention_time(batch),
            attention=attention_time_per_token(
                self.model, self.attention_device, self.attention_workers // self.shards, batch
            ),
            wire=self.wire.busy_time(batch),
            exposed=self.wire.exposed_time(batch),
            hideable=hideable,
            prompt_wire=float(self.wire.key_value_time(1.0)),
        )

    def device_counts(self) -> tuple[tuple[Device, int], ...]:
        return (
            (self.compute.device, self.model_workers),
            (self.attention_device, self.attention_workers),
        )


def baseline(model: Model, device: Device, count: int, catalogue: Catalogue) -> Baseline:
    """Tensor-parallel vLLM on `count` devices."""
    return Baseline(ComputeGroup(model, device, count, catalogue.collective))


def lamina(
    model: Model,
    model_device: Device,
    attention_device: Device,
    dop: tuple[int, int],
    catalogue: Catalogue,
    *,
    transport: str = "fhbn",
    lanes: int = 2,
    partition: str = HEAD,
    overlap: bool = True,
) -> Lamina:
    """Lamina with DOP (a, b); with n > 2 lanes a counts the devices of all n - 1 replicas.

    Raises
    ------
    ConfigError
        a cannot be divided among the replicas, or the deployment is otherwise impossible.
    """
    replicas = max(1, lanes - 1)
    if dop[0] % replicas:
        raise ConfigError(f"{dop[0]} model workers cannot hold {replicas} equal replicas for {lanes} batches")
    return Lamina(
        compute=ComputeGroup(model, model_device, dop[0] // replicas, catalogue.collective),
        attention_device=attention_device,
        attention_workers=dop[1],
        transport=catalogue.transport(transport),
        lanes=lanes,
        partition=partition,
        overlap=overlap,
    )
