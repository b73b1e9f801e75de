"""The planner's formulas against figures worked out by hand and against the paper's."""

import numpy as np
import pytest
from planner_examples import MODEL, device, example_baseline, example_lamina

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.cost import ComputeGroup, Wire, attention_time_per_token
from vllm_lamina.planner.deployment import baseline, lamina
from vllm_lamina.planner.devices import Collective, Curve, Transport, read_catalogue
from vllm_lamina.planner.model_configs import builtin_models
from vllm_lamina.planner.results import steady_state

CATALOGUE = read_catalogue()
MODELS = builtin_models()


@pytest.mark.parametrize(
    ("name", "weights_gb", "group"),
    [("llama-33b", 64.7, 1), ("llama-65b", 130.1, 1), ("llama3-70b", 137.5, 8)],
)
def test_models_match_the_papers_table(name: str, weights_gb: float, group: int) -> None:
    model = MODELS[name]
    # The paper seems to leave the input embedding out.
    assert (model.weight_bytes - 2 * model.embedding_params) / 1e9 == pytest.approx(weights_gb, rel=0.015)
    assert model.group == group


def test_wire_bytes_of_llama3_70b() -> None:
    model = MODELS["llama3-70b"]
    assert model.wire_bytes_per_token == 36_864 * 80  # (2 + 2/8) * 2 bytes * 8192, 80 layers: 2.95 MB
    assert model.kv_bytes_per_token == 327_680


def test_an_h100_holds_thirty_requests_of_8k() -> None:
    model = MODELS["llama3-70b"]
    assert CATALOGUE.device("h100").memory_bytes / (model.kv_bytes_per_token * 8192) == pytest.approx(
        30, abs=0.5
    )


def test_equal_cost_settings() -> None:
    h100, h20 = CATALOGUE.device("h100"), CATALOGUE.device("h20")
    small, large = MODELS["llama-33b"], MODELS["llama3-70b"]
    assert lamina(small, h100, h20, (1, 2), CATALOGUE).cost("paper") == pytest.approx(20.32)
    assert baseline(small, h100, 2, CATALOGUE).cost("paper") == pytest.approx(22.12)
    assert lamina(large, h100, h20, (2, 4), CATALOGUE).cost("paper") == pytest.approx(40.64)
    assert baseline(large, h100, 4, CATALOGUE).cost("paper") == pytest.approx(44.24)


def test_non_attention_time_by_hand() -> None:
    group = ComputeGroup(MODEL, device(), 1, Collective(0.0, 1.0))
    # Memory: 0.1 GB of weights and 2 * 2 * 1000 bytes per token at 1 GB/s. Compute: 1e8 FLOP per token at 1e12 FLOP/s.
    times = group.non_attention_time([1, 1000, 10_000])
    np.testing.assert_allclose(times, [0.100004, 0.104, 1.0])


def test_tensor_parallelism_by_hand() -> None:
    group = ComputeGroup(MODEL, device(), 2, Collective(1e-3, 0.5))
    # Half of 0.100004 s; 20 all-reduces of 1 ms and 2 * 1/2 * 2000 bytes at 0.5e12 bytes/s.
    assert group.non_attention_time(1) == pytest.approx(0.050002 + 20 * (1e-3 + 2000 / 0.5e12))


def test_attention_time_by_hand() -> None:
    # 20,000 bytes at 1 GB/s against 4 * 10 * 1000 FLOP at 1e12 FLOP/s.
    assert attention_time_per_token(MODEL, device(), 1, 1) == pytest.approx(20e-6)
    assert attention_time_per_token(MODEL, device(), 4, 1) == pytest.approx(5e-6)
    assert attention_time_per_token(MODEL, device(flops=1e9), 1, 1) == pytest.approx(40e-6)


def test_wire_time_by_hand() -> None:
    transport = Transport("t", "t", round_trip=1e-3, utilisation=0.5)
    wire = Wire(MODEL, transport, 1e9, 4e9, 4, "head")
    # q, and the output, are 20,000 bytes a token, k and v together as much; 0.5 GB/s; ten round trips.
    assert wire.busy_time(100) == pytest.approx(100 * 40_000 / 0.5e9)
    assert wire.exposed_time(100) == pytest.approx(100 * 60_000 / 0.5e9 + 10e-3)
    # Three replicas have three times the NICs, and send 20,000 bytes of hidden state beside.
    rotating = Wire(MODEL, transport, 1e9, 2e9, 4, "head", replicas=3)
    assert rotating.busy_time(100) == pytest.approx(100 * max(60_000 / 1.5e9, 40_000 / 1e9))
    split_contexts = Wire(MODEL, transport, 1e9, 4e9, 4, "sequence")
    assert split_contexts.busy_time(100) == pytest.approx(100 * (4 * 20_000 + 20_000) / 0.5e9)


def test_moe_reads_only_the_experts_it_touches() -> None:
    model = MODELS["mixtral-8x7b"]
    assert model.experts is not None
    assert model.experts.touched(1) == pytest.approx(2)
    assert model.experts.touched(2) == pytest.approx(8 * (1 - 0.75**2))
    assert model.weight_bytes / 2 == pytest.approx(46.7e9, rel=0.01)
    assert model.active_params == pytest.approx(12.9e9, rel=0.02)
    assert model.streamed_bytes(1) < model.streamed_bytes(64) <= model.weight_bytes


def test_kv_capacity_by_hand() -> None:
    # 90% of 1 GB, less 0.1 GB of weights on the baseline, at 20,000 bytes per token.
    assert example_baseline().kv_tokens == 40_000
    assert example_lamina(workers=5).kv_tokens == 225_000
    assert example_lamina(workers=3, partition="request").shard_tokens == 45_000


def test_more_devices_than_kv_heads_hold_copies() -> None:
    model = MODELS["llama3-70b"]
    h100 = CATALOGUE.device("h100")
    sixteen, eight = baseline(model, h100, 16, CATALOGUE), baseline(model, h100, 8, CATALOGUE)
    free = [0.9 * n * 80e9 - model.weight_bytes for n in (16, 8)]
    assert sixteen.kv_tokens / eight.kv_tokens == pytest.approx(free[0] / free[1] / 2, rel=1e-4)


def test_no_network_and_one_batch_is_the_plain_sum() -> None:
    state = steady_state(example_lamina(), batch=10, context=1000)
    assert state.tbt == pytest.approx((0.1 + 10 * 4e-6) + 10 * 1000 * 20e-6)


def test_rotation_is_perfect_when_the_pool_fits() -> None:
    # Two replicas, three batches: t_m = 0.10004 s and, at t_a = t_m / 2, all devices are busy all the time.
    deployment = example_lamina(lanes=3)
    context = 0.10004 / 2 / (10 * 20e-6)
    state = steady_state(deployment, batch=30, context=context)
    assert state.tbt == pytest.approx(3 * 0.10004 / 2)
    assert state.model_busy == pytest.approx(1.0)
    assert state.attention_busy == pytest.approx(1.0)


def test_overlap_hides_key_and_value_behind_attention() -> None:
    transport = Transport("t", "t", round_trip=0.0, utilisation=1.0)
    slow = device(network=1e9)
    plain, early = (
        steady_state(
            example_lamina(transport=transport, overlap=overlap, model_device=slow, attention_device=slow),
            10,
            1000,
        )
        for overlap in (False, True)
    )
    # k and v: 2 * 10 * 1000 * 500 of 50e6 parameters, and 10 tokens of 20,000 bytes at 1 GB/s.
    assert plain.tbt - early.tbt == pytest.approx(0.2 * (0.1 + 10 * 4e-6) + 10 * 20_000 / 1e9)


def test_curve_interpolates_in_log_batch() -> None:
    curve = Curve.read([[1, 0.2], [16, 0.6]])
    np.testing.assert_allclose(curve.at([1, 4, 16, 64]), [0.2, 0.4, 0.6, 0.6])
    with pytest.raises(ConfigError, match="increase"):
        Curve.read([[4, 0.2], [2, 0.6]])
    with pytest.raises(ConfigError, match=r"in \(0, 1\]"):
        Curve.read(1.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, c: baseline(m, c.device("h100"), 1, c), r"141\.1 GB\) do not fit .* at least 2"),
        (
            lambda m, c: lamina(m, c.device("h100"), c.device("h20"), (2, 3), c),
            "8 KV heads, which 3 attention",
        ),
        (lambda m, c: lamina(m, c.device("h100"), c.device("a10"), (2, 4), c), "a10 .* has no network"),
        (
            lambda m, c: lamina(m, c.device("h100"), c.device("h20"), (3, 4), c, lanes=3),
            "3 model workers cannot",
        ),
        (lambda m, c: baseline(m, c.device("h100"), 5, c), "size 5 does not divide the 64 heads"),
        (lambda m, c: baseline(m, c.device("xeon-6900p"), 2, c), "no link for tensor parallelism"),
        (
            lambda m, c: lamina(m, c.device("h100"), c.device("h20"), (2, 4), c, partition="x"),
            "head, request",
        ),
    ],
)
def test_impossible_deployments_say_why(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        make(MODELS["llama3-70b"], CATALOGUE)
