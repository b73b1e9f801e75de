"""Calibration finds the constants that made the measurements, and its file is one the planner reads."""

import os
from pathlib import Path

import numpy as np
import pytest

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.calibrate import (
    SHAPES,
    HostRates,
    StepFit,
    StepSample,
    as_toml,
    fit_steps,
    split_cpus,
)
from vllm_lamina.planner.cost import ComputeGroup, attention_time_per_token
from vllm_lamina.planner.devices import read_catalogue
from vllm_lamina.planner.model_configs import model_from_config
from vllm_lamina.planner.models import Model
from vllm_lamina.units import parse_cpus

TRUTH = StepFit(8e11, 1.4e10, 2e-3, 4e-4, 3e-4, 0.0)


def model(hidden: int, layers: int, intermediate: int) -> Model:
    return model_from_config(
        {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 256,
            "intermediate_size": intermediate,
            "vocab_size": 8192,
            "tie_word_embeddings": True,
        },
        "random",
    )


def seconds(which: Model, batch: int) -> float:
    matrix = max(
        2 * which.active_params * batch / TRUTH.flops,
        (float(which.streamed_bytes(batch)) + 4 * batch * which.hidden) / TRUTH.weight_bandwidth,
    )
    overheads = TRUTH.step_overhead + TRUTH.layer_overhead * which.layers + TRUTH.sequence_overhead * batch
    return matrix + overheads


def samples(noise: float) -> list[StepSample]:
    random = np.random.default_rng(0)
    models = [model(*shape) for shape in SHAPES]
    return [
        StepSample(m, batch, seconds(m, batch) * (1 + noise * random.standard_normal()))
        for m in models
        for batch in (1, 4, 16, 64)
    ]


def test_fit_recovers_the_constants() -> None:
    fit = fit_steps(samples(0.0))
    assert fit.error < 0.005
    assert fit.weight_bandwidth == pytest.approx(TRUTH.weight_bandwidth, rel=0.05)
    assert fit.flops == pytest.approx(TRUTH.flops, rel=0.2)
    assert fit.layer_overhead == pytest.approx(TRUTH.layer_overhead, rel=0.1)


def test_fit_predicts_another_model_despite_noise() -> None:
    fit = fit_steps(samples(0.03))
    other = model(1024, 16, 2816)
    for batch in (1, 8, 32):
        matrix = max(
            2 * other.active_params * batch / fit.flops,
            float(other.streamed_bytes(batch)) / fit.weight_bandwidth,
        )
        overheads = fit.step_overhead + fit.layer_overhead * other.layers + fit.sequence_overhead * batch
        assert matrix + overheads == pytest.approx(seconds(other, batch), rel=0.08)


def test_file_is_a_catalogue(tmp_path: Path) -> None:
    rates = HostRates(TRUTH, {1: 8e9, 8: 1e10}, {1: 1.5e10, 8: 1.6e10}, exchange=5e-5, wire_bandwidth=4e9)
    path = tmp_path / "host.toml"
    path.write_text(as_toml(rates, "0", "1"))
    catalogue = read_catalogue(path)
    host, worker = catalogue.device("this-host"), catalogue.device("this-host-worker")
    some = model(1024, 16, 2816)
    group = ComputeGroup(some, host, 1, catalogue.collective)
    assert float(group.non_attention_time(8)) == pytest.approx(seconds(some, 8), rel=1e-3)
    for device, rate in ((host, 1e10), (worker, 1.6e10)):
        assert attention_time_per_token(some, device, 1, 8) == pytest.approx(
            some.kv_bytes_per_token / rate, rel=1e-3
        )
    assert catalogue.transport("this-host").round_trip == pytest.approx(5e-5)
    assert worker.network_bandwidth == pytest.approx(4e9)


def test_cpus_of_both_workers() -> None:
    assert split_cpus("0-3;4,5") == ("0-3", "4,5")
    model, worker = split_cpus(None)
    assert {*parse_cpus(model), *parse_cpus(worker)} == os.sched_getaffinity(0)
    with pytest.raises(ConfigError, match="both workers"):
        split_cpus("0-3")
    with pytest.raises(ValueError, match="not a list of CPUs"):
        split_cpus("a;b")
