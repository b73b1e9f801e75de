"""Draws an answer of the planner: what each deployment costs and yields."""

from __future__ import annotations

from pathlib import Path

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.question import Answer


def plot_answer(answer: Answer, path: Path) -> None:
    """Draw throughput against cost of the simulated deployments, with lines of equal tokens per dollar.

    Raises
    ------
    ConfigError
        Matplotlib is not installed, or the file's format is not one it writes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install vllm-lamina[plan]") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for candidates, colour, marker, label in (
        (answer.baselines, "tab:blue", "s", "vLLM"),
        (answer.laminas, "tab:orange", "o", "Lamina"),
    ):
        costs = [c.total_cost for c in candidates]
        axes.scatter(
            costs, [c.throughput for c in candidates], c=colour, marker=marker, label=label, zorder=3
        )
    named = [candidates[0] for candidates in (answer.baselines, answer.laminas) if candidates]
    right = 1.15 * max(c.total_cost for c in answer.ranked)
    for candidate, style in zip(named, ("--", "-"), strict=False):
        cost = candidate.total_cost
        axes.annotate(
            candidate.deployment.name,
            (cost, candidate.throughput),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
        slope = candidate.throughput / cost
        axes.plot([0, right], [0, slope * right], style, color="grey", linewidth=0.8, zorder=1)
    axes.set(
        xlabel="USD per hour",
        ylabel="tokens per second",
        xlim=(0, right),
        ylim=(0, 1.15 * max(c.throughput for c in answer.ranked)),
        title=f"{answer.question.model.name}, {answer.question.trace.name} (lines: equal tokens per dollar)",
    )
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=110)
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from error
