"""Simulates fleets of Lamina engines: what saturates as they grow, and what a failed worker costs.

    python benchmarks/fleet.py                              # tables, and the plot into docs/images
    python benchmarks/fleet.py --update docs/fleet.md

LLaMA3-70B on H100 model workers and H20 attention workers, prompts computed elsewhere, the planner's default
efficiencies, the host-bypassed network unless a table says otherwise.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from paper import replace_section
from paper_model import CATALOGUE, H20, H100, MODELS

from vllm_lamina.planner.deployment import Deployment, lamina
from vllm_lamina.planner.results import SimulationResult, SteadyState, steady_state
from vllm_lamina.planner.simulator import EngineOptions, Failure, simulate
from vllm_lamina.planner.traces import WORKLOADS, Trace, load_trace

MODEL = MODELS["llama3-70b"]
# (a, b), batches in flight.
SHAPES = [
    ((2, 2), 2),
    ((2, 4), 2),
    ((2, 8), 2),
    ((4, 8), 2),
    ((4, 8), 3),
    ((8, 8), 5),
    ((8, 16), 5),
    ((16, 32), 9),
]
FLEET_RATE = 2000.0
DETECTION, NEW_PROCESS, LOADING = 5.0, 30.0, 10e9
DAY = 86_400.0


def engine(dop: tuple[int, int], batches: int, *, gbps: float = 400.0, partition: str = "") -> Deployment:
    """Lamina for LLaMA3-70B; by heads where they divide, else by requests."""
    compute, memory = (replace(device, network_bandwidth=gbps * 1e9 / 8) for device in (H100, H20))
    chosen = partition or ("head" if MODEL.kv_heads % dop[1] == 0 else "request")
    return lamina(MODEL, compute, memory, dop, CATALOGUE, lanes=batches, partition=chosen)


def full(deployment: Deployment, trace: Trace) -> SteadyState:
    """The steady state with a full KV cache."""
    batch = int(0.99 * deployment.kv_tokens / (trace.mean_context + 8))
    return steady_state(deployment, batch, trace.mean_context)


def capacity_table() -> list[str]:
    """What one engine of each shape serves when saturated, and what saturates."""
    lines = [
        "| Trace | (a,b), batches | Requests/s | Batch | TBT ms | Model workers | Attention pool | Wire | per USD/h |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("azure-conv", "kimi-conv"):
        trace = load_trace(name)
        for dop, batches in SHAPES:
            deployment = engine(dop, batches)
            state = full(deployment, trace)
            rate = state.throughput / trace.outputs.mean()
            lines.append(
                f"| {name} | {dop}, {batches} | {rate:.1f} | {state.batch:,} | {1e3 * state.tbt:.0f} | "
                f"{state.model_busy:.0%} | {state.attention_busy:.0%} | {state.wire_busy:.0%} | "
                f"{rate / deployment.cost('paper'):.2f} |"
            )
    return lines


def wire_table() -> list[str]:
    """Which bandwidth saturates the wire, for engines that are otherwise the same."""
    trace = load_trace("azure-conv")
    lines = ["| (a,b), batches | 400 Gb/s | 200 Gb/s | 100 Gb/s | 50 Gb/s | 25 Gb/s |", "| --- " * 6 + "|"]
    for dop, batches in (((2, 4), 2), ((4, 8), 3), ((8, 16), 5)):
        cells = []
        for gbps in (400.0, 200.0, 100.0, 50.0, 25.0):
            state = full(engine(dop, batches, gbps=gbps), trace)
            cells.append(f"{state.throughput:,.0f} tokens/s, wire {state.wire_busy:.0%}")
        lines.append(f"| {dop}, {batches} | {' | '.join(cells)} |")
    return lines


def fleet(
    deployment: Deployment, engines: int, seconds: float = 120.0, seed: int = 0
) -> list[SimulationResult]:
    """Serve `FLEET_RATE` requests per second, each sent to an engine at random: every engine sees a Poisson process."""
    recipe, results = WORKLOADS["azure-conv"], []
    rate = FLEET_RATE / engines
    for index in range(engines):
        trace = replace(recipe, requests=max(1, round(rate * seconds)), duration=seconds)
        drawn = trace.trace("azure-conv", seed=seed + index)
        results.append(simulate(deployment, drawn.at_rate(rate, seed=seed + index)))
    return results


def fleet_table(sizes: tuple[int, ...]) -> tuple[list[str], list[tuple[int, float, float]]]:
    """The fleet at a fixed load as it grows; also (engines, load, p99 TTFT) for the plot."""
    dop, batches = (2, 4), 2
    deployment = engine(dop, batches)
    saturated = full(deployment, load_trace("azure-conv")).throughput / WORKLOADS["azure-conv"].output.mean
    lines = [
        "| Engines | Workers | Load | Batch | TBT p50/p99 ms | TTFT p50/p99 s | Model workers | Pool | Wire |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    points = []
    for engines in sizes:
        results = fleet(deployment, engines)
        load = FLEET_RATE / engines / saturated

        def mean(field: str, results: list[SimulationResult] = results) -> float:
            return float(np.mean([getattr(result, field) for result in results]))

        worst_ttft = float(np.mean([result.ttft.p99 for result in results]))
        points.append((engines, load, worst_ttft))
        lines.append(
            f"| {engines} | {sum(dop) * engines} | {load:.0%} | {mean('mean_batch'):.0f} | "
            f"{1e3 * np.mean([r.tbt.p50 for r in results]):.0f} / {1e3 * np.mean([r.tbt.p99 for r in results]):.0f} | "
            f"{np.mean([r.ttft.p50 for r in results]):.2f} / {worst_ttft:.2f} | "
            f"{mean('model_busy'):.0%} | {mean('attention_busy'):.0%} | {mean('wire_busy'):.0%} |"
        )
    return lines, points


def failure_table() -> list[str]:
    """One failed worker in an engine at 80% load, and what a fleet loses in which one worker in 1000 fails a day."""
    cases = [
        ("model worker, one replica of (2,4)", (2, 4), 2, "head", ()),
        ("model worker, one of 4 replicas of (8,16)", (8, 16), 5, "request", ()),
        ("attention worker of (2,4), split by heads", (2, 4), 2, "head", (0,)),
        ("attention worker of (2,4), split by requests", (2, 4), 2, "request", (0,)),
        ("attention worker of (8,16), split by requests", (8, 16), 5, "request", (0,)),
    ]
    lines = [
        "| What fails | Down s | Requests losing KV | Longest wait s | Engine-seconds lost | Of a day | For good |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for label, dop, batches, partition, shards in cases:
        deployment = engine(dop, batches, partition=partition)
        replica_bytes = MODEL.weight_bytes / deployment.compute.tensor_parallel
        downtime = DETECTION + NEW_PROCESS + (0.0 if shards else replica_bytes / LOADING)
        lost, result, calm = _one_failure(deployment, downtime, shards)
        workers = sum(dop)
        # Failures a day in a fleet of N workers: N / 1000. Engine-seconds it has in a day: N / workers * DAY.
        share = lost * workers / 1000 / DAY
        # Not replaced: the part of its engine that cannot serve without it.
        part = 1.0 / (deployment.shards if shards else deployment.replicas)
        lines.append(
            f"| {label} | {downtime:.0f} | {result.preemptions - calm.preemptions} | {result.longest_wait:.0f} | "
            f"{lost:.0f} | {share:.5%} | {part * workers / 1000:.2%} |"
        )
    return lines


def _one_failure(
    deployment: Deployment, downtime: float, shards: tuple[int, ...]
) -> tuple[float, SimulationResult, SimulationResult]:
    """Engine-seconds of work that the failure adds, and the runs with and without it."""
    trace = load_trace("azure-conv")
    saturated = full(deployment, trace).throughput / trace.outputs.mean()
    load = trace.head(round(0.8 * saturated * 400)).at_rate(0.8 * saturated)
    options = EngineOptions(recompute=True)
    calm = simulate(deployment, load, options)
    result = simulate(deployment, load, options, [Failure(100.0, downtime, shards)])
    # While a shard is down the others serve; a whole pool that is down idles the engine.
    idle = downtime / (deployment.shards if shards else deployment.replicas)
    extra = (result.model_seconds - calm.model_seconds) / deployment.replicas
    return idle + max(0.0, extra), result, calm


def draw(path: Path, points: list[tuple[int, float, float]]) -> None:
    """The wait for a first token as the fleet shrinks."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    engines, loads, waits = zip(*points, strict=True)
    axes.plot([100 * load for load in loads], waits, "o-")
    for count, load, wait in zip(engines, loads, waits, strict=True):
        axes.annotate(
            str(count),
            (100 * load, wait),
            xytext=(-6, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set(
        xlabel="load, % of what a saturated fleet serves",
        ylabel="time to first token, p99, s",
        yscale="log",
        title=f"{FLEET_RATE:,.0f} requests/s of Azure-Conv; numbers: (2,4) engines",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Run the study, print its tables, draw its plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, default=Path("docs/images"), help="where the plot goes (%(default)s)"
    )
    parser.add_argument("--update", type=Path, help="Markdown file whose sections to replace")
    args = parser.parse_args()
    table, points = fleet_table((44, 50, 52, 54, 56, 60, 70, 100))
    sections = {
        "capacity": capacity_table(),
        "wire": wire_table(),
        "load": table,
        "failure": failure_table(),
    }
    for name, lines in sections.items():
        print(f"\n{name}\n" + "\n".join(lines))
        if args.update:
            replace_section(args.update, name, "\n".join(lines))
    draw(args.images / "fleet-load.png", points)


if __name__ == "__main__":
    main()
