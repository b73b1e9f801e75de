"""Writes an answer for people and for programs: verdict with its reasons, ranked table, commands, JSON, plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.cost import MEMORY_UTILISATION
from vllm_lamina.planner.deployment import Baseline, Deployment, Lamina
from vllm_lamina.planner.models import Model
from vllm_lamina.planner.results import SteadyState
from vllm_lamina.planner.search import Answer, Candidate

WORTH_IT = 1.05
"""Gain over the best baseline from which disaggregation is recommended; less drowns in the model's errors."""

PORT = 7100
_MODEL_WORKER_KINDS = ("cpu",)
_ATTENTION_WORKER_KINDS = ("cpu",)
_MAX_BATCHES = 2


def bottleneck(candidate: Candidate) -> str:
    """What holds a candidate back, with how busy it is."""
    state = candidate.estimate
    if isinstance(candidate.deployment, Baseline):
        if state.attention_busy > state.model_busy:
            return f"attention ({state.attention_busy:.0%} of the step)"
        return f"non-attention operators ({state.model_busy:.0%} of the step)"
    return f"{state.bottleneck} ({_busiest(state):.0%} busy)"


def _busiest(state: SteadyState) -> float:
    return max(state.model_busy, state.attention_busy, state.wire_busy)


def network_need(candidate: Candidate) -> float:
    """Gb/s, one way, per NIC of the busier side, averaged over a step; 0 without Lamina."""
    deployment = candidate.deployment
    if not isinstance(deployment, Lamina):
        return 0.0
    wire, state = deployment.wire, candidate.estimate
    per_second = (wire.query_bytes + deployment.model.kv_bytes_per_token) * state.throughput
    nics = min(deployment.model_workers, deployment.attention_workers)
    return per_second * 8 / 1e9 / nics


def verdict(answer: Answer) -> tuple[bool, list[str]]:
    """Return whether to disaggregate, and why."""
    question = answer.question
    if not answer.laminas:
        why = sorted(answer.reasons, key=lambda reason: -answer.reasons[reason])[:3]
        return False, ["no split of this model onto these devices is possible", *why]
    best = answer.laminas[0]
    if not answer.baselines:
        return True, ["vLLM alone cannot serve this model and trace on these devices; the split can"]
    plain, gain = answer.baselines[0], answer.gain(best) or 0.0
    reasons = [
        f"{best.deployment.name} gives {gain:.2f} x the {answer.metric} of {plain.deployment.name} "
        f"({best.throughput:,.0f} tokens/s for {best.total_cost:.2f} USD/h against "
        f"{plain.throughput:,.0f} for {plain.total_cost:.2f})",
        f"batch {best.served.mean_batch:.0f} against {plain.served.mean_batch:.0f}; held back by {bottleneck(best)}, "
        f"vLLM by {bottleneck(plain)}",
    ]
    reasons += _price_of_bandwidth(best, plain, question.price_set)
    if 1.0 <= gain < WORTH_IT:
        reasons.append(f"a gain below {WORTH_IT:.2f} x is less than what such a model can tell apart")
    elif gain < 1.0:
        reasons += _why_not(best, plain)
    return gain >= WORTH_IT, reasons


def _price_of_bandwidth(best: Candidate, plain: Candidate, price_set: str) -> list[str]:
    devices = {device.key: device for c in (best, plain) for device, _ in c.deployment.device_counts()}
    if len(devices) < 2:
        return []
    parts = [
        f"{device.key} {device.memory_bandwidth / 1e9 / (price := device.price(price_set).usd):,.0f} GB/s and "
        f"{device.memory_bytes / 1e9 / price:.0f} GB per USD/h"
        for device in devices.values()
    ]
    return ["memory for the money: " + "; ".join(parts)]


def _why_not(best: Candidate, plain: Candidate) -> list[str]:
    """Explain in terms of the hardware why the split does not pay."""
    reasons = []
    compute, batch = plain.deployment.compute, plain.estimate.batch
    efficiency = compute.device.efficiency
    flops = 2.0 * compute.model.active_params * batch / (compute.tensor_parallel * compute.device.flops)
    compute_time = flops / float(efficiency.gemm_mfu.at(batch))
    if compute_time > 0.95 * float(compute.matrix_time(batch)):
        reasons.append(
            f"vLLM alone already runs batches of {batch}, at which the matrix products are bound by compute: a larger "
            "batch brings no more tokens per device"
        )
    if plain.estimate.attention_busy < 0.3:
        reasons.append(
            f"attention is only {plain.estimate.attention_busy:.0%} of vLLM's step: contexts are short, so there is "
            "little to move away"
        )
    split_model, split_attention = (device for device, _ in best.deployment.device_counts())
    if split_attention.key == split_model.key:
        reasons.append("none of these devices is cheaper for attention than the one that runs the model")
    elif compute.device.key == split_attention.key:
        reasons.append(
            f"{compute.device.key} alone, with weights and attention, is cheaper per token: the compute of "
            f"{split_model.key} costs more than it saves"
        )
    elif best.estimate.model_busy > 0.9:
        reasons.append(
            "the split's model workers are saturated: per dollar it has less compute and weight bandwidth than vLLM, "
            "whose devices all hold weights"
        )
    return reasons or ["the larger batch is outweighed by the price of the attention workers"]


def format_answer(answer: Answer, model_argument: str, show: int = 8) -> str:
    """Lay the answer out as text."""
    question, trace = answer.question, answer.question.trace
    yes, reasons = verdict(answer)
    lines = [
        f"{question.model.name}, {trace.name}: {len(trace):,} requests, mean prompt {trace.prompts.mean():,.0f} and "
        f"output {trace.outputs.mean():,.0f} tokens; {answer.considered} deployments considered",
        "",
        ("DISAGGREGATE: " if yes else "DO NOT DISAGGREGATE: ") + reasons[0],
        *(f"  - {reason}" for reason in reasons[1:]),
        "",
        *_table(answer, show),
        "",
        "Prices (USD per hour of one device):",
        *_prices(answer),
    ]
    chosen = answer.laminas[0] if yes else answer.ranked[0] if answer.ranked else None
    if chosen is not None:
        lines += ["", f"To start {chosen.deployment.name}:"]
        lines += [f"  {line}" for line in commands(chosen.deployment, model_argument, chosen.max_sequences)]
        missing = limits(chosen.deployment)
        if missing:
            lines += ["", f"This release of vllm-lamina does not run it yet: it lacks {'; '.join(missing)}."]
    return "\n".join(lines)


def _table(answer: Answer, show: int) -> list[str]:
    with_rate = answer.question.rate is not None
    header = (
        f"{'deployment':<34}{'USD/h':>8}{'tokens/s':>10}{'Mtok/USD':>10}{'gain':>7}{'batch':>7}{'TBT p50/p99 ms':>16}"
        f"{'TTFT p99 s' if with_rate else '':>{12 * with_rate}}{'Gb/s/NIC':>10}  bottleneck"
    )
    rows = [header, "-" * (len(header) + 20)]
    for candidate in _shown(answer, show):
        gain, need, served = answer.gain(candidate), network_need(candidate), candidate.served
        name = candidate.deployment.name + (f" x {candidate.copies}" if candidate.copies > 1 else "")
        tbt = f"{1e3 * served.tbt.p50:.1f}/{1e3 * served.tbt.p99:.1f}"
        ttft = f"{served.ttft.p99:>12.2f}" if with_rate else ""
        rows.append(
            f"{name:<34}{candidate.total_cost:>8.2f}{candidate.throughput:>10,.0f}"
            f"{candidate.tokens_per_dollar / 1e6:>10.2f}{f'{gain:.2f}x' if gain else '-':>7}"
            f"{served.mean_batch:>7.0f}{tbt:>16}{ttft}{f'{need:.1f}' if need else '-':>10}  {bottleneck(candidate)}"
        )
    return rows


def _shown(answer: Answer, show: int) -> list[Candidate]:
    """The best, and the best baseline of every device, so that each has something to be compared with."""
    best_of_device: dict[str, Candidate] = {}
    for candidate in answer.baselines:
        best_of_device.setdefault(candidate.deployment.compute.device.key, candidate)
    keep = [*answer.ranked[:show], *best_of_device.values()]
    return [candidate for candidate in answer.ranked if any(candidate is other for other in keep)]


def _prices(answer: Answer) -> list[str]:
    prices = [(device, device.price(answer.question.price_set)) for device in answer.question.devices]
    lines = [f"  {device.key:<12}{price.usd:>7.2f}  {price.date}, {price.source}" for device, price in prices]
    years = {price.date[:4] for _, price in prices if price.date < "9999"}
    if len(years) > 1:
        lines.append("  These prices are from different years; give today's with --price NAME=USD.")
    return lines


def answer_as_json(answer: Answer, model_argument: str) -> dict[str, Any]:
    """The answer as plain data."""
    yes, reasons = verdict(answer)
    return {
        "model": answer.question.model.name,
        "trace": answer.question.trace.name,
        "disaggregate": yes,
        "reasons": reasons,
        "considered": answer.considered,
        "candidates": [_as_json(answer, candidate, model_argument) for candidate in answer.ranked],
    }


def _as_json(answer: Answer, candidate: Candidate, model_argument: str) -> dict[str, Any]:
    result = candidate.served
    return {
        "deployment": candidate.deployment.name,
        "lamina": candidate.is_lamina,
        "copies": candidate.copies,
        "usd_per_hour": candidate.total_cost,
        "tokens_per_second": candidate.throughput,
        "tokens_per_dollar": candidate.tokens_per_dollar,
        "gain": answer.gain(candidate),
        "mean_batch": result.mean_batch,
        "max_num_seqs": candidate.max_sequences,
        "tbt_seconds": {"mean": result.tbt.mean, "p50": result.tbt.p50, "p99": result.tbt.p99},
        "ttft_seconds": {"mean": result.ttft.mean, "p50": result.ttft.p50, "p99": result.ttft.p99},
        "busy": {
            "model_workers": result.model_busy,
            "attention_workers": result.attention_busy,
            "network": result.wire_busy,
        },
        "rejected_requests": result.rejected,
        "bottleneck": bottleneck(candidate),
        "network_gbps_per_nic": network_need(candidate),
        "commands": commands(candidate.deployment, model_argument, candidate.max_sequences),
        "not_in_this_release": limits(candidate.deployment),
    }


def model_to_serve(argument: str, model: Model) -> str:
    """What to give `vllm serve`: the directory of a config.json, or the model's name on the hub."""
    if argument.endswith("config.json"):
        return str(Path(argument).parent)
    return model.name if "/" in model.name else argument


def commands(deployment: Deployment, model_argument: str, max_sequences: int) -> list[str]:
    """Return the shell commands, attention workers first, each headed by where to run it."""
    compute = deployment.compute
    serve = f"vllm serve {model_to_serve(model_argument, deployment.model)} --max-num-seqs {max_sequences}"
    if compute.tensor_parallel > 1:
        serve += f" --tensor-parallel-size {compute.tensor_parallel}"
    if not isinstance(deployment, Lamina):
        return [f"# on {compute.tensor_parallel} x {compute.device.name}", serve]
    memory = int(MEMORY_UTILISATION * deployment.attention_device.memory_bytes / 1e9)
    hosts = [f"attention-{index}" for index in range(deployment.attention_workers)]
    lamina = f"--executor lamina --lamina-batches {deployment.lanes}"
    where = hosts[0] if len(hosts) == 1 else f"each of {hosts[0]} to {hosts[-1]}"
    return [
        f"# on {where}, with one {deployment.attention_device.name}",
        f"vllm-lamina worker --listen 0.0.0.0:{PORT} --memory {memory}GB --secret-file lamina.secret",
        f"# on {deployment.model_workers} x {compute.device.name}",
        f"{serve} {lamina} --lamina-workers {','.join(f'{host}:{PORT}' for host in hosts)} "
        "--lamina-secret-file lamina.secret",
    ]


def limits(deployment: Deployment) -> list[str]:
    """Return what the deployment needs that this release does not do; empty if it can run."""
    if not isinstance(deployment, Lamina):
        return []
    missing = []
    if deployment.compute.device.kind not in _MODEL_WORKER_KINDS:
        missing.append(
            f"model workers on {deployment.compute.device.key} (CUDA is written and has not been run)"
        )
    if deployment.attention_device.kind not in _ATTENTION_WORKER_KINDS:
        missing.append(f"attention workers on {deployment.attention_device.key} (they run on CPUs)")
    if deployment.lanes > _MAX_BATCHES:
        missing.append(f"{deployment.lanes} staggered batches ({_MAX_BATCHES} at most)")
    return missing


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
        raise ConfigError("--plot needs matplotlib: pip install 'vllm-lamina[plan]'") from error
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
