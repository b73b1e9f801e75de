#!/usr/bin/env python
"""Decode throughput of Lamina and of stock vLLM on the same two cores: same model, same requests, in turns.

Lamina has one core for the model and one for attention, with its default settings; stock vLLM has both cores, or one.
With `s`, the share of attention in a step of stock vLLM on one core, moving attention to the second core can at best
speed a step up by 1 / max(s, 1 - s): that is the bound beside the measured figure. `s` is what a step takes beyond one
with next to no context.

The engines of all systems are started once and take turns run by run, so that whatever else changes on the machine
changes for all of them; each figure is a median. The KV cache of the prompts is filled by copies, not computed.

    python benchmarks/throughput.py --output results                                     # the real model
    python benchmarks/throughput.py --output results --model benchmarks/models/llama-1b  # a random one of 1B
    python benchmarks/throughput.py --output results --quick                             # a few minutes
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from report import add_engine_options, describe_machine, plot, write_results
from systems import DEFAULT_MODEL, STOCK_1, STOCK_2, Engine, Model, Workload, lamina

LAMINA = lamina("Lamina, 1 + 1")
SYSTEMS = (LAMINA, STOCK_2, STOCK_1)
FULL = ["512x1", "512x8", "512x32", "512x64", "2048x1", "2048x8", "2048x32", "8064x1", "8064x8", "8064x16"]
QUICK = ["512x8", "2048x8"]
SHORT_CONTEXT = 32


@dataclass(frozen=True)
class Row:
    """One workload: decode tokens/s of each system, medians."""

    workload: str
    decode: dict[str, float]
    runs: dict[str, list[float]]
    attention_share: float
    """Of a step of stock vLLM on one core."""

    @property
    def bound(self) -> float:
        """Of the speed-up over stock vLLM on one core."""
        return 1 / max(self.attention_share, 1 - self.attention_share)

    def speed_up(self, system: str) -> float:
        """Over stock vLLM on one core."""
        return self.decode[system] / self.decode[STOCK_1.name]


def run_all(args: argparse.Namespace) -> list[Row]:
    model = Model(args.model, args.dtype)
    limit = model.config["max_position_embeddings"]
    for workload in args.workloads:
        if workload.context + 1 + args.output_tokens > limit:
            raise SystemExit(f"{workload.name}: the model's limit is {limit} tokens with the output")
    options = model.engine(
        max_num_seqs=max(w.batch for w in args.workloads), enforce_eager=args.enforce_eager
    )
    tokens = max(w.batch * (w.context + args.output_tokens + 256) for w in args.workloads)
    pool = int(1.1 * max(tokens, limit + 256) * model.kv_bytes_per_token)
    rows = []
    with contextlib.ExitStack() as stack:
        engines = {}
        for system in SYSTEMS:
            print(f"starting: {system.name}", flush=True)
            log_file = args.output / f"{system.name.replace(', ', '-').replace(' ', '-')}.log"
            engines[system.name] = stack.enter_context(Engine(system, options, pool, log_file))
        without_attention: dict[int, float] = {}
        for workload in args.workloads:
            if workload.batch not in without_attention:
                short = Workload(SHORT_CONTEXT, workload.batch).prompts(model.vocab_size)
                run = engines[STOCK_1.name].run(short, args.output_tokens, fill=False)
                without_attention[workload.batch] = workload.batch / run["decode_tokens_per_s"]
            rows.append(run_workload(workload, engines, model, without_attention[workload.batch], args))
    return rows


def run_workload(
    workload: Workload,
    engines: dict[str, Engine],
    model: Model,
    other_seconds: float,
    args: argparse.Namespace,
) -> Row:
    prompts = workload.prompts(model.vocab_size)
    runs: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(args.repeats):
        for name, engine in engines.items():
            runs[name].append(engine.run(prompts, args.output_tokens)["decode_tokens_per_s"])
    decode = {name: statistics.median(values) for name, values in runs.items()}
    step_seconds = workload.batch / decode[STOCK_1.name]
    row = Row(workload.name, decode, runs, max(0.0, 1 - other_seconds / step_seconds))
    print(f"{workload.name}: {decode}, bound {row.bound:.2f}", flush=True)
    return row


def table(rows: list[Row]) -> str:
    lines = [
        "| context x batch | Lamina, 1 + 1 | stock, 2 cores | stock, 1 core | attention share s "
        "| bound 1 / max(s, 1 - s) | Lamina / stock 1 | of the bound | stock 2 / stock 1 | Lamina / stock 2 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ours, theirs = row.speed_up(LAMINA.name), row.speed_up(STOCK_2.name)
        cells = " | ".join(f"{row.decode[system.name]:.1f}" for system in SYSTEMS)
        lines.append(
            f"| {row.workload} | {cells} | {row.attention_share:.0%} | {row.bound:.2f} | {ours:.2f} "
            f"| {ours / row.bound:.2f} | {theirs:.2f} | {ours / theirs:.2f} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face directory")
    parser.add_argument("--workloads", nargs="+", metavar="CONTEXTxBATCH")
    parser.add_argument("--output-tokens", type=int, default=32, help="per request (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer workloads, not compiled")
    add_engine_options(parser)
    args = parser.parse_args()
    try:
        names = args.workloads or (QUICK if args.quick else FULL)
        args.workloads = [Workload.parse(name) for name in names]
    except ValueError as error:
        parser.error(str(error))
    args.enforce_eager = args.enforce_eager or args.quick
    return args


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    rows = run_all(args)
    write_results(
        args.output / "throughput.json", machine, args, [asdict(row) | {"bound": row.bound} for row in rows]
    )
    print(f"\nDecode tokens/s, {args.model.name}\n\n{table(rows)}")
    values = {(row.workload, name): value for row in rows for name, value in row.decode.items()}
    plot(values, f"Decode tokens/s, {args.model.name}", machine["cpu"], args.output / "throughput.png")


if __name__ == "__main__":
    main()
