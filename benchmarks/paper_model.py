"""Computes the paper's figures from the planner: the numbers behind benchmarks/paper.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.cost import ComputeGroup, attention_time_per_token
from vllm_lamina.planner.deployment import Deployment, baseline, lamina
from vllm_lamina.planner.devices import Array, Curve, Efficiency, read_catalogue
from vllm_lamina.planner.model_configs import builtin_models
from vllm_lamina.planner.models import Model
from vllm_lamina.planner.results import steady_state
from vllm_lamina.planner.simulator import simulate
from vllm_lamina.planner.traces import WORKLOADS, Trace, load_trace

CATALOGUE = read_catalogue()
H100, H20 = CATALOGUE.device("h100"), CATALOGUE.device("h20")
IDEAL = Efficiency(*[Curve.read(1.0)] * 4)
"""The roofline itself."""
MODELS = builtin_models()
EQUAL_COST = {"llama-33b": (2, (1, 2)), "llama-65b": (4, (2, 4)), "llama3-70b": (4, (2, 4))}
PUBLIC_FILES = {
    "azure-conv": "azure-conv.csv",
    "azure-code": "azure-code.csv",
    "kimi-conv": "kimi-conv.jsonl",
}


@dataclass(frozen=True)
class Cell:
    """Equal-cost comparison of one model on one trace."""

    model: str
    trace: str
    source: str
    left_out: float
    vllm: float
    one_batch: float
    two_batches: float
    vllm_batch: float
    lamina_batch: float
    vllm_tbt: float
    lamina_tbt: float

    @property
    def gain(self) -> float:
        """Throughput of Lamina with two staggered batches over vLLM's."""
        return self.two_batches / self.vllm


def minimum_bandwidth(
    model: Model, tokens: ArrayLike, non_attention_time: ArrayLike, attention_time: ArrayLike, slack: float
) -> Array:
    """Least bytes/s that keeps the network's part of a step under a fraction `slack` (alpha) of the rest.

    ``(2 + 2/G) e d B L / (alpha (MTIME(B) + ATIME(B, l)))`` (arXiv 2405.01814, section 3), both directions together.
    """
    moved = np.asarray(tokens, dtype=np.float64) * model.wire_bytes_per_token
    return np.asarray(moved / (slack * np.add(non_attention_time, attention_time)))


def least_bandwidth(batch: Array, context: int, *, ideal: bool = False) -> Array:
    """GB/s of the paper's formula for LLaMA3-70B on one H100 and one H20 at 20% slack."""
    model = MODELS["llama3-70b"]
    compute, memory = (replace(device, efficiency=IDEAL) if ideal else device for device in (H100, H20))
    group = ComputeGroup(model, compute, 1, CATALOGUE.collective)
    attention = attention_time_per_token(model, memory, 1, batch) * batch * context
    return minimum_bandwidth(model, batch, group.non_attention_time(batch), attention, 0.2) / 1e9


def trace_for(name: str, directory: Path | None) -> tuple[Trace, str]:
    """The public trace if it is there, else the synthetic one."""
    path = directory / PUBLIC_FILES[name] if directory and name in PUBLIC_FILES else None
    if path is not None and path.exists():
        return load_trace(str(path)), "public"
    return load_trace(name), "synthetic"


def equal_cost(directory: Path | None) -> list[Cell]:
    """Simulate both systems on every model and trace, on the requests that fit into vLLM's KV cache."""
    cells = []
    for model_name, (gpus, dop) in EQUAL_COST.items():
        model = MODELS[model_name]
        alone = baseline(model, H100, gpus, CATALOGUE)
        splits = [lamina(model, H100, H20, dop, CATALOGUE, lanes=lanes) for lanes in (1, 2)]
        for trace_name in WORKLOADS:
            trace, source = trace_for(trace_name, directory)
            fits = trace.prompts + trace.outputs <= int(0.98 * alone.kv_tokens)
            common = Trace(trace.name, np.zeros(fits.sum()), trace.prompts[fits], trace.outputs[fits])
            vllm, one, two = (simulate(deployment, common) for deployment in (alone, *splits))
            cells.append(
                Cell(
                    model=model_name,
                    trace=trace_name,
                    source=source,
                    left_out=1.0 - len(common) / len(trace),
                    vllm=vllm.throughput,
                    one_batch=one.throughput,
                    two_batches=two.throughput,
                    vllm_batch=vllm.mean_batch,
                    lamina_batch=two.mean_batch,
                    vllm_tbt=vllm.tbt.p50,
                    lamina_tbt=two.tbt.p50,
                )
            )
    return cells


def overlap_gain(model_name: str, context: int) -> tuple[Array, Array]:
    """Batch sizes up to what (2,4) holds, and the fraction of TBT that sending q early saves, one batch in flight."""
    model = MODELS[model_name]
    early = lamina(model, H100, H20, (2, 4), CATALOGUE, lanes=1)
    late = replace(early, overlap=False)
    batches = np.unique(np.geomspace(1, max(1, early.kv_tokens // context), 40).astype(int))
    times = np.array([[steady_state(d, int(b), context).tbt for d in (early, late)] for b in batches])
    return batches, 1.0 - times[:, 0] / times[:, 1]


def per_dollar(model: Model, trace: Trace) -> dict[str, float]:
    """Tokens per dollar at the paper's prices, by deployment, in the steady state of a full KV cache."""
    found: dict[str, float] = {}
    makers = [lambda n=n: baseline(model, H100, n, CATALOGUE) for n in (1, 2, 4, 8)]
    makers += [
        lambda d=d: lamina(model, H100, H20, d, CATALOGUE)
        for d in ((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (2, 8))
    ]
    for make in makers:
        try:
            deployment: Deployment = make()
        except ConfigError:
            continue  # the weights do not fit, or the heads do not divide
        batch = int(deployment.kv_tokens / trace.mean_context)
        if batch >= 1:
            state = steady_state(deployment, batch, trace.mean_context)
            found[deployment.name] = state.throughput * 3600 / deployment.cost("paper")
    return found


def sensitivity() -> list[tuple[str, float, float]]:
    """Smallest and largest steady-state gain of the twelve cells under other assumptions, each alone."""

    def span(label: str, overhead: float = 0.0, **changes: Curve) -> tuple[str, float, float]:
        compute = replace(H100, efficiency=replace(H100.efficiency, **changes))
        gains = []
        for model_name, (gpus, dop) in EQUAL_COST.items():
            model = MODELS[model_name]
            slow = replace(compute, efficiency=replace(compute.efficiency, step_overhead=overhead))
            pair = (baseline(model, slow, gpus, CATALOGUE), lamina(model, compute, H20, dop, CATALOGUE))
            for workload in WORKLOADS.values():
                context = workload.prompt.mean + workload.output.mean / 2
                rates = []
                for deployment in pair:
                    batch = max(1, int(deployment.kv_tokens / context))
                    rates.append(steady_state(deployment, batch, context).throughput)
                gains.append(rates[1] / rates[0])
        return label, min(gains), max(gains)

    return [
        span("as above, full KV cache, no simulation"),
        span("weights at 60% of bandwidth", weight_mbu=Curve.read(0.60)),
        span("weights at 90% of bandwidth", weight_mbu=Curve.read(0.90)),
        span("vLLM loses 5 ms of each step to its host", overhead=0.005),
        span("vLLM loses 10 ms of each step to its host", overhead=0.010),
    ]


def dollar_ratios(dollars: dict[tuple[str, str], dict[str, float]]) -> tuple[list[float], list[float]]:
    """Best Lamina configuration over the best, and over the smallest, homogeneous one; per model and trace."""
    over_best, over_smallest = [], []
    for found in dollars.values():
        split = max(value for name, value in found.items() if name.startswith("("))
        alone = [value for name, value in found.items() if not name.startswith("(")]
        over_best.append(split / max(alone))
        over_smallest.append(split / alone[0])
    return over_best, over_smallest


def shortest_context(batch: int, bound: float) -> int:
    """Context, in steps of 64 tokens, from which the least bandwidth is under a bound in GB/s."""
    contexts = range(64, 65_536, 64)
    return next(c for c in contexts if float(least_bandwidth(np.array([float(batch)]), c)[0]) < bound)
