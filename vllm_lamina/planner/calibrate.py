"""``vllm-lamina plan calibrate``: measures this host and writes it as devices for the planner's catalogue."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from pathlib import Path

import numpy as np

from vllm_lamina.config import AUTO
from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.cpus import place
from vllm_lamina.planner.devices import Array
from vllm_lamina.planner.engine_steps import Case, Measurement, measure_steps
from vllm_lamina.planner.model_configs import model_from_config
from vllm_lamina.planner.models import Model
from vllm_lamina.units import format_cpus, parse_cpus

BATCHES = (1, 4, 16, 64)
SHORT, LONG = 32, 2048
LONG_BATCHES = (1, 4, 8)
REPEATS = 3
# Hidden size, layers, feed-forward size: one small and deep, one small and shallow, one whose weights dominate.
SHAPES = ((512, 24, 1408), (512, 8, 1408), (1536, 12, 4096))
# What the kernel reads when it is timed alone; the pool is larger than caches.
HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 8, 2, 64, 128
POOL_BYTES = 384 << 20


@dataclass(frozen=True)
class StepSample:
    """One measured step of a model with contexts too short to matter: sequences and seconds."""

    model: Model
    batch: int
    seconds: float


@dataclass(frozen=True)
class StepFit:
    """What explains the samples.

    Attributes
    ----------
    flops, weight_bandwidth
        FLOP/s and bytes/s that the matrix products reach.
    step_overhead, layer_overhead, sequence_overhead
        Seconds per step, per layer, per sequence.
    error
        Median relative error over the samples.
    """

    flops: float
    weight_bandwidth: float
    step_overhead: float
    layer_overhead: float
    sequence_overhead: float
    error: float


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


def calibrate(output: Path, cpus: str | None = None, say: Callable[[str], None] = print) -> None:
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
        The CPUs cannot be read, or this process may not use them.
    MeasurementFailed
        vLLM does not run on this host.
    """
    model_cpus, worker_cpus = split_cpus(cpus)
    missing = {*parse_cpus(model_cpus), *parse_cpus(worker_cpus)} - os.sched_getaffinity(0)
    if missing:
        raise ConfigError(f"--cpus {cpus!r} names CPUs that this process may not use: {format_cpus(missing)}")
    say(
        f"model worker on CPUs {model_cpus}, attention worker on CPUs {worker_cpus}; this takes a few minutes"
    )
    rates = measure_host(model_cpus, worker_cpus, say)
    output.write_text(as_toml(rates, model_cpus, worker_cpus), encoding="utf-8")
    say(f"wrote {output}; the fit's median error is {rates.steps.error:.1%}")


def split_cpus(cpus: str | None) -> tuple[str, str]:
    """Read ``0;1``, or halve the CPUs this process may use; a `ConfigError` says what cannot be read."""
    if cpus is None:
        halves = place(allowed=os.sched_getaffinity(0), worker_cpus=AUTO, bind=AUTO, model_on_cpu=True)
        assert halves.model_cpus is not None
        return format_cpus(halves.model_cpus[0]), format_cpus(halves.worker_cpus[0])
    model, separator, worker = cpus.partition(";")
    if not separator:
        raise ConfigError(f"--cpus {cpus!r} must name both workers' CPUs, such as '0;1' or '0-7;8-15'")
    try:
        parse_cpus(model)
        parse_cpus(worker)
    except ValueError as error:
        raise ConfigError(f"--cpus {cpus!r}: {error}") from error
    return model, worker


def measure_host(model_cpus: str, worker_cpus: str, say: Callable[[str], None]) -> HostRates:
    """Time stock vLLM on three random models, Lamina on one, and the kernel alone."""
    short = [Case(batch, SHORT) for batch in BATCHES]
    long = [Case(batch, LONG) for batch in LONG_BATCHES]
    samples: list[StepSample] = []
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, f"model{i}") for i in range(len(SHAPES))]
        models = [random_model(path, *shape) for path, shape in zip(paths, SHAPES, strict=True)]
        deep = models[0]

        def run(path: Path, cases: list[Case], *, batches: int) -> list[Measurement]:
            say(
                f"timing {'Lamina' if batches else 'vLLM'} on {path.name}: {len(cases)} cases, {REPEATS} times"
            )
            found = measure_steps(
                path, cases * REPEATS, batches=batches, model_cpus=model_cpus, worker_cpus=worker_cpus
            )
            # Other work only ever adds time.
            return [min(found[i :: len(cases)], key=lambda m: m.quartile) for i in range(len(cases))]

        stock = run(paths[0], short + long, batches=0)
        samples += [StepSample(deep, m.batch, m.quartile) for m in stock if m.context == SHORT]
        for path, model in zip(paths[1:], models[1:], strict=True):
            samples += [StepSample(model, m.batch, m.quartile) for m in run(path, short, batches=0)]
        split = run(paths[0], short, batches=1)
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


def random_model(path: Path, hidden: int, layers: int, intermediate: int, vocabulary: int = 8192) -> Model:
    """Make the directory of a Llama with heads of 64, a KV head for every four, and no weights: vLLM draws them."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
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
    return model_from_config(config, path.name)


def kernel_read_rate(batch: int, context: int, cpus: list[int], seconds: float = 1.0) -> float:
    """Return bytes of KV that the kernel reads per second, bfloat16, decoding.

    Parameters
    ----------
    batch, context
        Sequences, and cached tokens of each; layers are read in turn, 384 MiB in all, as a model does.
    cpus
        CPU of each thread.
    """
    from vllm_lamina.kernels import Arena, AttentionKernel, ScoreRule, ThreadPool

    kernel = AttentionKernel("bfloat16", HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE)
    threads = ThreadPool(len(cpus), cpus)
    blocks = -(-context // BLOCK_SIZE)
    layer_bytes = batch * blocks * kernel.block_bytes
    count = max(2, POOL_BYTES // layer_bytes)
    memory = Arena(count * layer_bytes).array()
    layers = memory[: count * layer_bytes].reshape(count, batch * blocks, kernel.block_bytes)
    tokens = np.full((batch * context, KV_HEADS, HEAD_SIZE), 0x3C00, np.uint16)  # 0.0078125 in bfloat16
    slots = np.concatenate([np.arange(context) + row * blocks * BLOCK_SIZE for row in range(batch)])
    for layer in layers:
        kernel.append(layer, tokens, tokens, slots.astype(np.int64), threads)
    query = np.full((batch, HEADS, HEAD_SIZE), 0x3C00, np.uint16)
    starts = np.arange(batch + 1, dtype=np.int32)
    lengths = np.full(batch, context, np.int32)
    tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
    rule = ScoreRule(HEAD_SIZE**-0.5)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 2 * count:
        layer = layers[len(times) % count]
        start = time.perf_counter()
        kernel.attend(layer, query, starts, lengths, tables, rule, threads)
        times.append(time.perf_counter() - start)
    read = batch * context * 2 * KV_HEADS * HEAD_SIZE * 2
    return float(read / np.quantile(times[count:], 0.25))


def fit_steps(samples: Sequence[StepSample]) -> StepFit:
    """Fit ``t = step + layer L + sequence B + max(2NB / F, (eN + 2eBd) / M)`` by least relative squares.

    F and M are searched on a grid 4% fine between 1 GFLOP/s and 1 PFLOP/s, and 1 GB/s and 10 TB/s; for each pair the
    three overheads, which are not negative, follow by linear least squares.
    """
    seconds = np.array([s.seconds for s in samples])
    flops = np.array([2.0 * s.model.active_params * s.batch for s in samples])
    moved = np.array(
        [
            float(s.model.streamed_bytes(s.batch))
            + 2.0 * s.model.bytes_per_element * s.batch * s.model.hidden
            for s in samples
        ]
    )
    columns = np.array([[1.0, s.model.layers, s.batch] for s in samples])
    weighted = columns / seconds[:, None]

    def solve(rate: float, bandwidth: float) -> tuple[float, Array, Array]:
        matrix = np.maximum(flops / rate, moved / bandwidth)
        overheads = _non_negative(weighted, 1.0 - matrix / seconds)
        residual = (matrix + columns @ overheads) / seconds - 1.0
        return float((residual**2).sum()), overheads, residual

    best: tuple[float, float, float] | None = None
    for ratio in (1.5, 1.2, 1.04):
        rates, bandwidths = (
            (np.geomspace(1e9, 1e15, 35), np.geomspace(1e9, 1e13, 24))
            if best is None
            else (best[1] * ratio ** np.arange(-3.0, 4.0), best[2] * ratio ** np.arange(-3.0, 4.0))
        )
        for rate in rates:
            for bandwidth in bandwidths:
                loss = solve(rate, bandwidth)[0]
                if best is None or loss < best[0]:
                    best = (loss, float(rate), float(bandwidth))
    assert best is not None
    _, overheads, residual = solve(best[1], best[2])
    step, layer, sequence = overheads.tolist()
    return StepFit(best[1], best[2], step, layer, sequence, float(np.median(np.abs(residual))))


def _non_negative(matrix: Array, target: Array) -> Array:
    """Least squares with coefficients of at least 0, by trying which are 0 (there are three)."""
    count = matrix.shape[1]
    best, best_loss = np.zeros(count), float((target**2).sum())
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            columns = list(chosen)
            values = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            if (values < 0).any():
                continue
            loss = float(((matrix[:, columns] @ values - target) ** 2).sum())
            if loss < best_loss:
                best, best_loss = np.zeros(count), loss
                best[columns] = values
    return best


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
