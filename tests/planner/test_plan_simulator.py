"""The simulator against runs worked out by hand, and what must hold in every run."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_examples import MODEL, WINDOWS, device, example_baseline, example_lamina

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.deployment import Deployment, lamina
from vllm_lamina.planner.devices import read_catalogue
from vllm_lamina.planner.model_configs import builtin_models
from vllm_lamina.planner.results import steady_state
from vllm_lamina.planner.simulator import EngineOptions, Failure, simulate
from vllm_lamina.planner.traces import Trace, load_trace


def trace(prompts: list[int], outputs: list[int], arrivals: list[float] | None = None) -> Trace:
    times = np.zeros(len(prompts)) if arrivals is None else np.array(arrivals)
    return Trace("example", times, np.array(prompts), np.array(outputs))


def test_one_request_by_hand() -> None:
    # Two steps of 0.1 s + 4 us of non-attention and 20 us per cached token, which are 101 and 102 of them.
    result = simulate(example_baseline(), trace([100], [2]))
    steps = [0.100004 + 101 * 20e-6, 0.100004 + 102 * 20e-6]
    assert result.duration == pytest.approx(sum(steps))
    assert result.ttft.mean == pytest.approx(steps[0])
    assert result.tbt.mean == pytest.approx(steps[1])
    assert result.tokens == 2
    assert result.throughput == pytest.approx(2 / sum(steps))


def test_layers_with_a_window_read_and_keep_no_more_than_it() -> None:
    # The first request's step as above, but half of the layers see 100 tokens of 1001.
    one = simulate(example_baseline(WINDOWS), trace([1_000], [1]))
    assert one.duration == pytest.approx(0.100004 + (1_001 + 100) / 2 * 20e-6)
    # Three requests of 19,000 tokens keep 9,500 and a bit each of the 40,000 there is room for; none waits.
    full, windows = (
        simulate(example_baseline(model), trace([19_000] * 3, [5] * 3)) for model in (MODEL, WINDOWS)
    )
    assert windows.ttft.p99 == pytest.approx(windows.ttft.p50)
    assert full.ttft.p99 > 2 * full.ttft.p50
    # With a window in every layer a request of any length fits.
    everywhere = replace(WINDOWS, attention=WINDOWS.attention[1:])
    assert simulate(example_baseline(everywhere), trace([10**6] * 3, [40] * 3)).rejected == 0


def test_two_lanes_share_one_model_replica() -> None:
    # No attention to speak of: two lanes of one request take turns, so each step takes two model stages.
    attention = device(bandwidth=1e15, flops=1e18)
    deployment = example_lamina(lanes=2, attention_device=attention)
    result = simulate(deployment, trace([100, 100], [50, 50]))
    assert result.tbt.p50 == pytest.approx(2 * 0.100004)
    assert result.model_busy == pytest.approx(1.0, abs=0.02)


def test_balanced_lanes_double_the_throughput() -> None:
    attention = device(bandwidth=20_000 * 5_000 / 0.1)  # about 0.1 s for 5,000 cached tokens
    prompts, outputs = [5_000] * 2, [40] * 2
    one = simulate(example_lamina(lanes=1, attention_device=attention), trace(prompts[:1], outputs[:1]))
    two = simulate(example_lamina(lanes=2, attention_device=attention), trace(prompts, outputs))
    assert two.throughput / one.throughput == pytest.approx(2.0, rel=0.03)


def test_a_request_waits_for_blocks() -> None:
    # 40,000 tokens of KV: two requests of 19,000 fit, the third starts when one of them is done.
    result = simulate(example_baseline(), trace([19_000] * 3, [5, 10, 5]))
    assert result.preemptions == 0
    assert result.ttft.p99 > 5 * result.ttft.p50 * 0.9
    assert result.tokens == 20


def test_preempted_requests_finish() -> None:
    # Both fit at first and outgrow the cache together; the later one gives way and comes back.
    result = simulate(example_baseline(), trace([19_500, 19_500], [800, 800]))
    assert result.preemptions >= 1
    assert result.tokens == 1600


def test_prefill_takes_time_and_is_chunked() -> None:
    arrivals, prompts, outputs = [0.0, 0.3], [16, 30_000], [100, 2]
    chunked = simulate(
        example_baseline(), trace(prompts, outputs, arrivals), EngineOptions(prefill=True, token_budget=1000)
    )
    removed = simulate(example_baseline(), trace(prompts, outputs, arrivals))
    assert chunked.tokens == removed.tokens == 102
    # 30 chunks of 0.1 s and more, beside which the first request goes on decoding.
    assert chunked.ttft.p99 > 3.0
    assert removed.ttft.p99 < 0.5 * chunked.ttft.p99
    assert chunked.tbt.p99 < 0.15 * chunked.ttft.p99


def test_prefill_and_preemption_keep_the_count_of_tokens() -> None:
    outputs = [700, 800, 900, 1]
    result = simulate(example_baseline(), trace([13_000] * 4, outputs), EngineOptions(prefill=True))
    assert result.preemptions >= 1
    assert result.tokens == sum(outputs)


def test_idle_engine_waits_for_arrivals() -> None:
    result = simulate(example_lamina(lanes=2), trace([100, 100], [2, 2], [0.0, 100.0]))
    assert 100.2 < result.duration < 100.3
    assert result.model_busy < 0.01


def test_requests_that_never_fit_are_counted() -> None:
    assert simulate(example_baseline(), trace([50_000, 10], [5, 5])).rejected == 1
    with pytest.raises(ConfigError, match=r"no request of trace 'example' fits .* 40000 tokens"):
        simulate(example_baseline(), trace([50_000], [5]))


def test_request_partition_waits_for_the_fullest_worker() -> None:
    long_and_short = trace([20_000, 2_000], [20, 20])
    by_head = simulate(example_lamina(workers=5), long_and_short)
    two_by_request = simulate(example_lamina(workers=2, partition="request"), long_and_short)
    # The long request's worker has 20,000 tokens to read, its neighbour 2,000; five share 22,000.
    assert two_by_request.tbt.p50 == pytest.approx(0.1 + 20_011 * 20e-6, rel=0.01)
    assert by_head.tbt.p50 == pytest.approx(0.1 + 22_022 * 4e-6, rel=0.01)


def test_a_model_worker_that_fails_costs_its_downtime() -> None:
    requests = trace([100] * 4, [50] * 4)
    deployment = example_lamina(lanes=2)
    calm = simulate(deployment, requests)
    failed = simulate(deployment, requests, failures=[Failure(time=2.0, downtime=5.0)])
    assert failed.tokens == calm.tokens == 200
    assert failed.preemptions == 0
    assert failed.duration == pytest.approx(calm.duration + 5.0, abs=0.3)


def test_an_attention_worker_that_fails_costs_its_requests_kv() -> None:
    requests = trace([5_000] * 6, [100] * 6)
    deployment = example_lamina(lanes=2, workers=3, partition="request")
    options = EngineOptions(recompute=True)
    calm = simulate(deployment, requests, options)
    failed = simulate(deployment, requests, options, [Failure(time=2.0, downtime=5.0, shards=(0,))])
    everything = simulate(deployment, requests, options, [Failure(time=2.0, downtime=5.0, shards=(0, 1, 2))])
    assert failed.tokens == everything.tokens == calm.tokens == 600
    # Two of six requests are on each shard. The others go on; all lost, all wait for the replacement.
    assert failed.preemptions == 2
    assert everything.preemptions == 6
    assert failed.duration > calm.duration + 5.0
    assert everything.duration > calm.duration + 5.0


DEPLOYMENTS = st.one_of(
    st.builds(example_baseline, st.sampled_from([MODEL, WINDOWS])),
    st.builds(
        example_lamina,
        model=st.sampled_from([MODEL, WINDOWS]),
        lanes=st.integers(1, 4),
        workers=st.sampled_from([1, 5]),
        partition=st.sampled_from(["head", "request", "sequence"]),
        overlap=st.booleans(),
    ),
)
TRACES = st.lists(
    st.tuples(st.integers(1, 12_000), st.integers(1, 60), st.floats(0, 20)), min_size=1, max_size=25
).map(lambda rows: trace([r[0] for r in rows], [r[1] for r in rows], sorted(r[2] for r in rows)))


@settings(max_examples=60, deadline=None)
@given(deployment=DEPLOYMENTS, requests=TRACES, prefill=st.booleans())
def test_every_run_conserves_tokens_and_time(deployment: Deployment, requests: Trace, prefill: bool) -> None:
    result = simulate(deployment, requests, EngineOptions(prefill=prefill, token_budget=2048))
    assert result.rejected == 0
    assert result.tokens == requests.outputs.sum()
    # Under the roofline: per token, no batch is cheaper than the largest, and every decoded token reads its prompt.
    stages, count = deployment.stages(len(requests)), len(requests)
    bound = deployment.replicas * count / stages.model[count]
    assert result.tokens / result.duration <= bound * (1 + 1e-9)
    if not prefill:
        seen = deployment.model.read.tokens(requests.prompts)
        reads = float((seen * requests.outputs).sum()) * stages.attention[count]
        assert result.duration * (1 + 1e-9) >= reads / deployment.shards
    # The window of the busy fractions, in which half of the tokens or more are made, may cut through a step of each
    # lane, whose work it takes to be even.
    window = 0.5 * result.tokens / result.throughput
    longest_step = max(result.longest_wait, result.ttft.p99)
    cut = deployment.lanes * longest_step / window
    assert max(result.model_busy, result.attention_busy, result.wire_busy) <= 1 + cut + 1e-9
    fastest = stages.model[1] / deployment.replicas
    assert result.duration * 1.000001 >= fastest * requests.outputs.max()
    assert result.tbt.p50 <= result.tbt.p99


def test_saturated_run_agrees_with_the_steady_state() -> None:
    catalogue, model = read_catalogue(), builtin_models()["llama3-70b"]
    deployment = lamina(model, catalogue.device("h100"), catalogue.device("h20"), (2, 4), catalogue)
    requests = load_trace("kimi-ta").saturating().head(3000)
    result = simulate(deployment, requests)
    expected = steady_state(deployment, round(result.mean_batch), requests.mean_context)
    assert result.throughput == pytest.approx(expected.throughput, rel=0.03)
    assert result.model_busy == pytest.approx(expected.model_busy, abs=0.03)


def test_twenty_thousand_requests_take_under_a_minute() -> None:
    catalogue, model = read_catalogue(), builtin_models()["llama3-70b"]
    deployment = lamina(model, catalogue.device("h100"), catalogue.device("h20"), (2, 4), catalogue)
    requests = load_trace("azure-conv")
    start = time.process_time()
    assert simulate(deployment, requests).tokens == requests.outputs.sum()
    assert time.process_time() - start < 60
