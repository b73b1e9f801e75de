"""Draws the plots of benchmarks/paper.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllm_lamina.planner.devices import Array, Device
from vllm_lamina.planner.models import Model

if TYPE_CHECKING:
    from paper_model import Cell

DPI = 90


def _figure(columns: int = 1, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(6.5, 5.2 * columns), height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, columns)).tolist()
    for each in axes:
        each.grid(alpha=0.3)
    return figure, axes


def draw_bandwidth(path: Path, curves: Mapping[int, tuple[Array, Array]]) -> None:
    """Least bandwidth by batch, one curve for each context length."""
    figure, (axes,) = _figure()
    for context, (batches, bandwidth) in curves.items():
        axes.plot(batches, bandwidth, label=f"l = {context // 1024}K")
    axes.plot([1, 300], [30, 30], "k--", linewidth=1)
    axes.annotate("paper: under 30 GB/s up to B = 300", (1.2, 30.6), fontsize=8)
    axes.axhline(50, color="grey", linewidth=0.8)
    axes.annotate("400 Gb/s line rate", (1.2, 50.6), fontsize=8, color="grey")
    axes.set(
        xscale="log",
        xlabel="batch size B",
        ylabel="GB/s, both directions",
        ylim=(0, 55),
        title="Least bandwidth for 20% slack: LLaMA3-70B, H100 + H20",
    )
    axes.legend()
    figure.savefig(path, dpi=DPI)


def draw_rooflines(path: Path, devices: Sequence[Device], models: Sequence[Model]) -> None:
    """Where both kinds of operators lie under each device's roofline."""
    figure, columns = _figure(len(devices))
    for axes, device in zip(columns, devices, strict=True):
        intensity = np.geomspace(0.25, 4096, 200)
        axes.plot(intensity, np.minimum(device.flops, intensity * device.memory_bandwidth) / 1e12, "k-")
        for model, colour in zip(models, ("tab:blue", "tab:orange"), strict=True):
            element = model.bytes_per_element
            for batch in (1, 20, 100, 300, 1000):
                # 2NB FLOP over eN + 2eBd bytes; attention 4 FLOP per pair of elements of q over 2e/G bytes.
                flops = 2.0 * model.active_params * batch
                moved = element * (model.active_params + 2.0 * batch * model.hidden)
                reached = min(
                    device.flops * float(device.efficiency.gemm_mfu.at(batch)),
                    flops / moved * device.memory_bandwidth * float(device.efficiency.weight_mbu.at(batch)),
                )
                axes.plot(flops / moved, reached / 1e12, "o", color=colour, markersize=5)
                if model is models[0]:
                    axes.annotate(
                        f"B={batch}",
                        (flops / moved, reached / 1e12),
                        (-4, 5),
                        textcoords="offset points",
                        ha="right",
                        fontsize=7,
                    )
            ratio = model.attention_flops_per_cached_token / model.kv_bytes_per_token
            mbu = float(device.efficiency.attention_mbu.at(64))
            reached = min(ratio * device.memory_bandwidth * mbu, device.flops)
            axes.plot(
                ratio, reached / 1e12, "^", color=colour, markersize=9, label=f"{model.name.split('/')[-1]}"
            )
            axes.annotate(f"attention, G={model.group:g}", (ratio * 1.25, reached / 1e12 * 0.6), fontsize=8)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="FLOP per byte",
            ylabel="TFLOP/s",
            title=f"{device.name}: dots non-attention, triangles attention",
        )
        axes.title.set_fontsize(10)
        axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=DPI)


def draw_equal_cost(path: Path, cells: Sequence[Cell]) -> None:
    """Throughput and batch of Lamina over vLLM's at equal cost."""
    figure, (gains, batches) = _figure(2)
    models = list(dict.fromkeys(cell.model for cell in cells))
    traces = list(dict.fromkeys(cell.trace for cell in cells))
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        chosen = [cell for cell in cells if cell.model == model]
        places = np.arange(len(traces)) + (index - 1) * width
        gains.bar(places, [100 * (cell.gain - 1) for cell in chosen], width, label=model)
        batches.bar(places, [cell.lamina_batch / cell.vllm_batch for cell in chosen], width, label=model)
    gains.axhspan(16.1, 90.1, color="grey", alpha=0.15, zorder=0)
    gains.annotate("paper's range: 16.1 to 90.1%", (-0.4, 84), fontsize=8)
    gains.set(ylabel="throughput over vLLM, %", title="Equal cost, two staggered batches")
    batches.axhline(2.39, color="k", linestyle="--", linewidth=1)
    batches.annotate("paper's mean: 2.39", (-0.4, 2.43), fontsize=8)
    batches.set(ylabel="batch over vLLM's", title="Mean batch", ylim=(0, 3.2))
    for axes in (gains, batches):
        axes.set_xticks(range(len(traces)), traces)
    batches.legend(loc="upper right", ncols=3, fontsize=8)
    figure.savefig(path, dpi=DPI)


def draw_overlap(path: Path, curves: Mapping[tuple[str, int], tuple[Array, Array]]) -> None:
    """TBT saved by sending q before k and v, by batch."""
    figure, (axes,) = _figure()
    styles = {1024: "-", 4096: "--", 16384: ":"}
    for (model, context), (batches, gain) in curves.items():
        colour = "tab:blue" if model == "llama-65b" else "tab:orange"
        axes.plot(
            batches, 100 * gain, styles[context], color=colour, label=f"{model}, l = {context // 1024}K"
        )
    for level, text in ((13.2, "paper, LLaMA-65B: up to 13.2%"), (3.5, "paper, LLaMA3-70B: up to 3.5%")):
        axes.axhline(level, color="grey", linewidth=0.8)
        axes.annotate(text, (1.1, level + 0.2), fontsize=8)
    axes.set(
        xscale="log",
        xlabel="batch size B, up to what (2,4) holds",
        ylabel="TBT saved, %",
        ylim=(0, None),
        title="Sending q early, DOP (2,4), one batch",
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def draw_per_dollar(path: Path, dollars: Mapping[tuple[str, str], Mapping[str, float]]) -> None:
    """Tokens per dollar of every configuration, relative to the best homogeneous one of the same model and trace."""
    models = list(dict.fromkeys(model for model, _ in dollars))
    figure, columns = _figure(len(models))
    for axes, model in zip(columns, models, strict=True):
        cells = {trace: found for (name, trace), found in dollars.items() if name == model}
        names = list(dict.fromkeys(name for found in cells.values() for name in found))
        height = 0.8 / len(cells)
        for index, (trace, found) in enumerate(cells.items()):
            best = max(value for name, value in found.items() if not name.startswith("("))
            axes.barh(
                np.arange(len(names)) + index * height,
                [found.get(name, 0.0) / best for name in names],
                height,
                label=trace,
            )
        axes.set_yticks(np.arange(len(names)) + 0.3, [name.rsplit(", ", 1)[0] for name in names], fontsize=8)
        axes.axvline(1.0, color="k", linewidth=0.8)
        axes.set(title=model, xlabel="tokens per dollar, best vLLM = 1")
        axes.invert_yaxis()
    handles, labels = columns[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=DPI)
