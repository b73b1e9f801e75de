#!/usr/bin/env python
"""The paper's setting in small: the same two cores, a backlog of long generations, and KV memory that differs.

Stock vLLM's KV pool holds `--requests` requests (P). Lamina's pool holds 2.1 times as much, what the same money buys
where the KV cache lies on memory-optimised devices (Lamina paper: 2.39 times the batch at equal cost), and 8 times as
much, where memory is no limit. The prompts are computed, and count. The systems take turns, each figure is a median.

    python benchmarks/limited_memory.py --output results
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from report import add_engine_options, describe_machine, plot, write_results
from systems import DEFAULT_MODEL, STOCK_2, Engine, Model, System, Workload, lamina

BLOCK = 128
SYSTEMS: tuple[tuple[System, float], ...] = (
    (System("stock, P", STOCK_2.environment), 1.0),
    (lamina("Lamina, 2.1 P"), 2.1),
    (lamina("Lamina, 8 P"), 8.0),
)


@dataclass(frozen=True)
class Row:
    """Medians of one system."""

    system: str
    pool_mib: int
    output_tokens_per_s: float
    mean_batch: float
    all_tbt_p50_ms: float
    all_tbt_p99_ms: float


def run_all(args: argparse.Namespace) -> list[Row]:
    model = Model(args.model, args.dtype)
    length = args.prompt_tokens + args.output_tokens
    options = model.engine(max_num_seqs=args.backlog, enforce_eager=args.enforce_eager) | {
        "max_model_len": length + BLOCK,
        "enable_prefix_caching": False,  # the repeats would not compute their prompts
    }
    blocks = args.requests * -(-length // BLOCK) + 2  # one is vLLM's own, one for rounding
    pool = blocks * BLOCK * model.kv_bytes_per_token
    backlog = Workload(args.prompt_tokens, args.backlog).prompts(model.vocab_size)
    runs: dict[str, list[dict[str, float]]] = {system.name: [] for system, _ in SYSTEMS}
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(
                Engine(system, options, int(factor * pool), args.output / f"limited-{factor:g}P.log")
            )
            for system, factor in SYSTEMS
        ]
        for _ in range(args.repeats):
            for engine in engines:
                measured = engine.run(backlog, args.output_tokens, fill=False)
                runs[engine.system.name].append(measured)
                print(f"{engine.system.name}: {measured}", flush=True)
    keys = ("output_tokens_per_s", "mean_batch", "all_tbt_p50_ms", "all_tbt_p99_ms")
    return [
        Row(
            system.name,
            int(factor * pool) >> 20,
            *(statistics.median(run[key] for run in runs[system.name]) for key in keys),
        )
        for system, factor in SYSTEMS
    ]


def table(rows: list[Row]) -> str:
    stock = rows[0]
    lines = [
        "| system | KV pool, MiB | output tokens/s | over stock | mean batch | over stock | TBT p50 / p99, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.system} | {row.pool_mib} | {row.output_tokens_per_s:.1f} "
            f"| {row.output_tokens_per_s / stock.output_tokens_per_s:.2f} | {row.mean_batch:.1f} "
            f"| {row.mean_batch / stock.mean_batch:.2f} | {row.all_tbt_p50_ms:.0f} / {row.all_tbt_p99_ms:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face directory")
    parser.add_argument("--requests", type=int, default=4, help="that P holds (default: %(default)s)")
    parser.add_argument("--backlog", type=int, default=32, help="requests in all (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=384, help="(default: %(default)s)")
    add_engine_options(parser)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    rows = run_all(args)
    write_results(args.output / "limited_memory.json", machine, args, [asdict(row) for row in rows])
    workload = f"{args.backlog} requests of {args.prompt_tokens} + {args.output_tokens} tokens"
    print(f"\n{args.model.name}, {workload}\n\n{table(rows)}")
    values = {(workload, row.system): row.output_tokens_per_s for row in rows}
    plot(values, "Output tokens/s", machine["cpu"], args.output / "limited_memory.png")


if __name__ == "__main__":
    main()
