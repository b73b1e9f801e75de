"""``vllm-lamina plan calibrate``: measures this host and writes it as devices for the planner's catalogue."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.engine_steps import Case, Measurement, measure_steps
from vllm_lamina.planner.fit import StepFit, StepSample, fit_steps
from vllm_lamina.planner.kernel_rate import kernel_read_rate
from vllm_lamina.planner.models import Model, model_from_config
from vllm_lamina.units import format_cpus, parse_cpus

BATCHES = (1, 4, 16, 64)
SHORT, LONG = 32, 2048
LONG_BATCHES = (1, 4, 8)
REPEATS = 3
# Hidden size, layers, feed-forward size: one small and deep, one small and shallow, one whose weights dominate.
SHAPES = ((512, 24, 1408), (512, 8, 1408), (1536, 12, 4096))


@dataclass(frozen=True)
class HostRates:
    """Everything calibration finds.

    Attributes
    ----------
    steps
        Non-attention operators of the model worker.
    vllm_attention, kernel_attention
        Bytes/s of KV that vLLM's attention and the attention worker's read, by batch.
    exchange
        Seconds that Lamina adds to each layer at batch 1.
    wire_bandwidth
        Bytes/s at which q, k, v and the output cross.
    """

    steps: StepFit
    vllm_attention: dict[int, float]
    kernel_attention: dict[int, float]
    exchange: float
    wire_bandwidth: float


def calibrate(output: Path, cpus: str | None = None, say: Callable[[str], None] = print) -> HostRates:
    """Measure, fit, and write the catalogue file.

    Parameters
    ----------
    output
        TOML file for ``--catalogue``: devices ``this-host`` (a model worker, also stock vLLM) and ``this-host-worker``
        (an attention worker), and the transport ``this-host`` between them.
    cpus
        CPUs of the model worker and of the attention worker, as ``0;1``; by default each has half.

    Raises
    ------
    ConfigError
        The CPUs cannot be read.
    MeasurementFailed
        vLLM does not run on this host.
    """
    model_cpus, worker_cpus = split_cpus(cpus)
    say(
        f"model worker on CPUs {model_cpus}, attention worker on CPUs {worker_cpus}; this takes a few minutes"
    )
    rates = measure_host(model_cpus, worker_cpus, say)
    output.write_text(as_toml(rates, model_cpus, worker_cpus), encoding="utf-8")
    say(f"wrote {output}; the fit's median error is {rates.steps.error:.1%}")
    return rates


def split_cpus(cpus: str | None) -> tuple[str, str]:
    """Read ``0;1``, or halve the CPUs this process may use."""
    if cpus is None:
        allowed = sorted(os.sched_getaffinity(0))
        middle = -(-len(allowed) // 2)
        return format_cpus(allowed[:middle]), format_cpus(allowed[middle:] or allowed)
    model, separator, worker = cpus.partition(";")
    if not separator:
        raise ConfigError(f"--cpus {cpus!r} must name both workers' CPUs, such as '0;1' or '0-7;8-15'")
    for part in (model, worker):
        parse_cpus(part)
    return model, worker


def measure_host(model_cpus: str, worker_cpus: str, say: Callable[[str], None]) -> HostRates:
    """Time stock vLLM on three random models, Lamina on one, and the kernel alone."""
    short = [Case(batch, SHORT) for batch in BATCHES]
    long = [Case(batch, LONG) for batch in LONG_BATCHES]
    samples: list[StepSample] = []
    with tempfile.TemporaryDirectory() as directory:
        models = [_random_model(Path(directory, f"model{i}"), *shape) for i, shape in enumerate(SHAPES)]
        deep_path, deep = models[0]

        def run(path: Path, cases: list[Case], *, batches: int) -> list[Measurement]:
            say(
                f"timing {'Lamina' if batches else 'vLLM'} on {path.name}: {len(cases)} cases, {REPEATS} times"
            )
            found = measure_steps(
                path, cases * REPEATS, batches=batches, model_cpus=model_cpus, worker_cpus=worker_cpus
            )
            # Other work only ever adds time.
            return [min(found[i :: len(cases)], key=lambda m: m.quartile) for i in range(len(cases))]

        stock = run(deep_path, short + long, batches=0)
        samples += [StepSample(deep, m.batch, m.quartile) for m in stock if m.context == SHORT]
        for path, model in models[1:]:
            samples += [StepSample(model, m.batch, m.quartile) for m in run(path, short, batches=0)]
        split = run(deep_path, short, batches=1)
    say("timing the attention kernel")
    kernel = {
        batch: kernel_read_rate(batch, 4 * LONG, parse_cpus(worker_cpus), 1.0) for batch in LONG_BATCHES
    }
    short_stock = {m.batch: m.quartile for m in stock if m.context == SHORT}
    base = np.interp(LONG_BATCHES, list(short_stock), list(short_stock.values()))
    vllm = {
        m.batch: m.batch * (LONG - SHORT) * deep.kv_bytes_per_token / max(1e-6, m.quartile - start)
        for m, start in zip([m for m in stock if m.context == LONG], base, strict=True)
    }
    exchange, wire = _exchange(deep, short_stock, {m.batch: m.quartile for m in split})
    return HostRates(fit_steps(samples), vllm, kernel, exchange, wire)


def _exchange(model: Model, stock: dict[int, float], split: dict[int, float]) -> tuple[float, float]:
    """Seconds per layer that Lamina adds at batch 1, and bytes/s from what it adds as the batch grows."""
    added = {batch: split[batch] - stock[batch] for batch in stock}
    first, last = min(added), max(added)
    per_layer = max(0.0, added[first]) / model.layers
    growth = max(added[last] - max(0.0, added[first]), 1e-6)
    moved = (last - first) * model.wire_bytes_per_token
    # What memory could not do either is not the wire's rate but the measurement's noise.
    return per_layer, min(moved / growth, 1e10)


def _random_model(path: Path, hidden: int, layers: int, intermediate: int) -> tuple[Path, Model]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "intermediate_size": intermediate,
        "vocab_size": 8192,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path, model_from_config(config, path.name)


def as_toml(rates: HostRates, model_cpus: str, worker_cpus: str) -> str:
    """Write the rates as a catalogue: peaks are the best rates seen, efficiencies the others relative to them."""
    peak = max(rates.steps.weight_bandwidth, *rates.vllm_attention.values(), *rates.kernel_attention.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    source = f"vllm-lamina plan calibrate, {date.today().isoformat()}, {platform.machine()}"

    def curve(by_batch: dict[int, float]) -> str:
        points = [f"[{batch}, {min(1.0, rate / peak):.4f}]" for batch, rate in sorted(by_batch.items())]
        return f"[{', '.join(points)}]"

    def device(key: str, name: str, attention: dict[int, float], *, overheads: bool) -> list[str]:
        steps = rates.steps
        lines = [
            f"[device.{key}]",
            f'name = "{name}"',
            'kind = "cpu"',
            f"tflops = {steps.flops / 1e12:.5f}",
            f"memory_gb = {memory:.1f}",
            f"memory_tbps = {peak / 1e12:.6f}",
            f"network_gbps = {rates.wire_bandwidth * 8 / 1e9:.4f}",
            "link_gbs = 0",
            f'source = "{source}"',
            f"[device.{key}.efficiency]",
            f"weight_mbu = {steps.weight_bandwidth / peak:.4f}",
            "gemm_mfu = 1.0",
            f"attention_mbu = {curve(attention)}",
            "attention_mfu = 1.0",
        ]
        if overheads:
            lines += [
                f"step_overhead_us = {1e6 * steps.step_overhead:.1f}",
                f"layer_overhead_us = {1e6 * steps.layer_overhead:.1f}",
                f"sequence_overhead_us = {1e6 * steps.sequence_overhead:.2f}",
            ]
        return [*lines, f'source = "{source}; flops are what the matrix products reach"', ""]

    lines = device("this-host", f"this host, CPUs {model_cpus}", rates.vllm_attention, overheads=True)
    lines += device(
        "this-host-worker", f"this host, CPUs {worker_cpus}", rates.kernel_attention, overheads=False
    )
    lines += [
        "[transport.this-host]",
        'name = "between processes of this host"',
        f"round_trip_us = {1e6 * rates.exchange:.2f}",
        "utilisation = 1.0",
        f'source = "{source}: what Lamina adds to a layer of short contexts"',
        "",
    ]
    return "\n".join(lines)
