"""Deployments whose figures can be worked out by hand, for the planner's tests."""

from dataclasses import replace

from vllm_lamina.planner.cost import ComputeGroup
from vllm_lamina.planner.deployment import Baseline, Lamina
from vllm_lamina.planner.devices import Collective, Curve, Device, Efficiency, Price, Transport
from vllm_lamina.planner.models import AttentionLayers, Model

IDEAL = Efficiency(*[Curve.read(1.0)] * 4)
FREE_COLLECTIVE = Collective(0.0, 1.0)
NO_NETWORK = Transport("none", "no network", 0.0, 1.0)


def device(
    key: str = "unit",
    *,
    flops: float = 1e12,
    memory: float = 1e9,
    bandwidth: float = 1e9,
    network: float = 1e30,
    usd: float = 1.0,
) -> Device:
    """A device at the roofline: by default 1 TFLOP/s, 1 GB at 1 GB/s, a free network, 1 USD per hour."""
    prices = (Price(usd, "paper: an example", "2026-01"),)
    return Device(key, key, "gpu", flops, memory, bandwidth, network, 1e12, IDEAL, prices)


MODEL = Model(
    name="example",
    hidden=1000,
    attention=(AttentionLayers(10, heads=10, kv_heads=5, head_size=100),),
    dense_params=50_000_000,
    embedding_params=0,
)
"""0.1 GB of weights, G = 2, 20,000 bytes of KV per token, 60,000 bytes on the wire per token."""


WINDOWS = replace(
    MODEL, attention=(AttentionLayers(5, 10, 5, 100), AttentionLayers(5, 10, 5, 100, window=100))
)
"""The same, but half of its layers see 100 tokens."""


def example_baseline(model: Model = MODEL, **kwargs: float) -> Baseline:
    """One unit device, vLLM."""
    return Baseline(ComputeGroup(model, device(**kwargs), 1, FREE_COLLECTIVE))


def example_lamina(
    *,
    model: Model = MODEL,
    model_device: Device | None = None,
    attention_device: Device | None = None,
    workers: int = 1,
    transport: Transport = NO_NETWORK,
    lanes: int = 1,
    partition: str = "head",
    overlap: bool = False,
    tensor_parallel: int = 1,
) -> Lamina:
    """Unit devices, no overlap unless asked for."""
    return Lamina(
        ComputeGroup(model, model_device or device(), tensor_parallel, FREE_COLLECTIVE),
        attention_device or device(),
        workers,
        transport,
        lanes,
        partition,
        overlap,
    )
