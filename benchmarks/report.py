"""How benchmarks show their results: the machine they ran on, a table, a plot."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

Values = dict[tuple[str, str], float]
"""(workload, system) -> value."""


def describe_machine() -> dict[str, str]:
    """What a reader must know to compare the numbers with their own."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "vllm": importlib.metadata.version("vllm"),
        "torch": importlib.metadata.version("torch"),
        "vllm-lamina": importlib.metadata.version("vllm-lamina"),
    }


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options of benchmarks that compare whole engines."""
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each workload on each system (default: %(default)s)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory for JSON, PNG, logs")


def write_results(file: Path, machine: dict[str, str], options: argparse.Namespace, rows: list[Any]) -> None:
    """What was measured, on what, with which options, as JSON; rows are dictionaries."""
    results = {
        "machine": machine,
        "options": {name: str(value) for name, value in vars(options).items()},
        "rows": rows,
    }
    file.write_text(json.dumps(results, indent=2) + "\n")


def table(values: Values) -> str:
    """A Markdown table, one row per workload; in brackets, relative to the best of the other systems."""
    workloads, systems = _axes(values)
    rows = [f"| workload | {' | '.join(systems)} |", f"|---|{'---:|' * len(systems)}"]
    for workload in workloads:
        cells = []
        for system in systems:
            value = values[workload, system]
            best = max((values[workload, other] for other in systems if other != system), default=value)
            cells.append(f"{value:.1f} ({value / best:.2f}x)")
        rows.append(f"| {workload} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(values: Values, title: str, subtitle: str, file: Path) -> None:
    """Grouped bars as a PNG, one group per workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads, systems = _axes(values)
    figure, axes = pyplot.subplots(figsize=(1.8 + 1.4 * len(workloads), 4))
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        places = [group + (i - (len(systems) - 1) / 2) * width for group in range(len(workloads))]
        bars = axes.bar(places, [values[workload, system] for workload in workloads], width, label=system)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_title(f"{title}\n{subtitle}", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def _axes(values: Values) -> tuple[list[str], list[str]]:
    """Workloads and systems in the order in which they came."""
    return list(dict.fromkeys(w for w, _ in values)), list(dict.fromkeys(s for _, s in values))
