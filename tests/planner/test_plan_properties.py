"""What must hold for any device, model and batch: more never hurts, and limits are what they should be."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_examples import IDEAL

from vllm_lamina.planner.cost import ComputeGroup, attention_time_per_token
from vllm_lamina.planner.deployment import Lamina
from vllm_lamina.planner.devices import Device, read_catalogue
from vllm_lamina.planner.model_configs import builtin_models
from vllm_lamina.planner.models import Model
from vllm_lamina.planner.results import steady_state

CATALOGUE = read_catalogue()
FITTING = [name for name, model in builtin_models().items() if model.weight_bytes < 140e9]
MODELS = st.sampled_from([builtin_models()[name] for name in FITTING])
DEVICES = st.sampled_from([CATALOGUE.device(name) for name in ("h100", "h200", "b200", "mi300x")])
BATCHES = st.integers(1, 2048)
CONTEXTS = st.floats(1, 1e5)
FACTORS = st.floats(1.0, 10.0)


def deployment(
    model: Model, compute: Device, attention: Device, lanes: int, transport: str = "nccl"
) -> Lamina:
    group = ComputeGroup(model, compute, 1, CATALOGUE.collective)
    # Big enough for every model here: only times matter.
    group = replace(group, device=replace(compute, memory_bytes=1e12))
    return Lamina(group, attention, 2, CATALOGUE.transport(transport), lanes, "request")


@given(MODELS, DEVICES, DEVICES, st.integers(1, 4), BATCHES, CONTEXTS, FACTORS)
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_or_compute_is_never_slower(
    model, compute, attention, lanes, batch, context, factor
) -> None:  # type: ignore[no-untyped-def]
    def tbt(model_device: Device, attention_device: Device) -> float:
        return steady_state(deployment(model, model_device, attention_device, lanes), batch, context).tbt

    base = tbt(compute, attention) * (1 + 1e-12)
    for field in ("memory_bandwidth", "flops", "network_bandwidth"):
        for faster_compute in (True, False):
            chosen = compute if faster_compute else attention
            faster = replace(chosen, **{field: getattr(chosen, field) * factor})
            pair = (faster, attention) if faster_compute else (compute, faster)
            assert tbt(*pair) <= base, (field, faster_compute)


@given(MODELS, DEVICES, st.integers(1, 2047), st.sampled_from([1, 2, 4]))
@settings(max_examples=80, deadline=None)
def test_a_larger_batch_takes_longer_but_less_per_token(model, device, batch, tensor_parallel) -> None:  # type: ignore[no-untyped-def]
    group = ComputeGroup(model, device, tensor_parallel, CATALOGUE.collective)
    small, large = group.non_attention_time([batch, batch + 1])
    assert small <= large
    assert small / batch * (1 + 1e-12) >= large / (batch + 1)
    one, more = attention_time_per_token(model, device, 1, [batch, batch + 1])
    assert one * batch <= more * (batch + 1) * (1 + 1e-12)


@given(MODELS, DEVICES, DEVICES, BATCHES, CONTEXTS)
@settings(max_examples=60, deadline=None)
def test_no_network_and_one_batch_equals_the_plain_sum(model, compute, attention, batch, context) -> None:  # type: ignore[no-untyped-def]
    fast = replace(attention, network_bandwidth=1e30)
    single = replace(
        deployment(model, replace(compute, network_bandwidth=1e30), fast, 1, "ideal"),
        overlap=False,
        partition="sequence",
    )
    plain = float(single.compute.non_attention_time(batch)) + batch * float(
        model.read.tokens(context)
    ) * float(attention_time_per_token(model, attention, 2, batch))
    assert steady_state(single, batch, context).tbt == pytest.approx(plain, rel=1e-9)


@given(MODELS, DEVICES, DEVICES, st.integers(1, 4), BATCHES, CONTEXTS)
@settings(max_examples=60, deadline=None)
def test_overlap_never_hurts_and_stays_within_its_share(
    model, compute, attention, lanes, batch, context
) -> None:  # type: ignore[no-untyped-def]
    early = deployment(model, compute, attention, lanes)
    late = replace(early, overlap=False)
    with_overlap, without = (steady_state(d, batch, context).tbt for d in (early, late))
    per_lane = -(-batch // min(lanes, batch))
    assert with_overlap <= without
    assert without - with_overlap <= float(early.stages(per_lane).hideable[per_lane]) * (1 + 1e-9)


@given(MODELS, DEVICES, DEVICES, st.integers(1, 4), BATCHES, CONTEXTS)
@settings(max_examples=60, deadline=None)
def test_efficiency_only_loses(model, compute, attention, lanes, batch, context) -> None:  # type: ignore[no-untyped-def]
    real = steady_state(deployment(model, compute, attention, lanes), batch, context)
    at_the_roofline = (replace(device, efficiency=IDEAL) for device in (compute, attention))
    ideal = steady_state(deployment(model, *at_the_roofline, lanes), batch, context)
    assert ideal.tbt <= real.tbt
    assert max(real.model_busy, real.attention_busy, real.wire_busy) <= 1 + 1e-9
