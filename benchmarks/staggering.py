#!/usr/bin/env python
"""One batch in flight against two: the same model, one core a side, the same batch *per lane*.

With one lane `batch` requests decode; with two, twice as many, in two lanes. Each side then works on one batch while
the other side works on the other, so at best twice the tokens come in the same time. The engines take turns run by
run.

    python benchmarks/staggering.py --output results            # the table of docs/staggering.md
    python benchmarks/staggering.py --output results --quick
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from report import describe_machine, plot
from systems import Engine, System, threads
from throughput import DEFAULT_MODEL, Workload, kv_bytes_per_token

FULL = ["512x16", "2048x8", "2048x16", "2048x32", "7936x8"]
QUICK = ["2048x8"]

ONE = System(
    "one lane", threads("0", 1), {"executor": "lamina", "lamina_worker_cpus": "1", "lamina_batches": 1}
)
TWO = System(
    "two lanes",
    threads("0", 1),
    {"executor": "lamina", "lamina_worker_cpus": "1", "lamina_stagger": "always"},
)


@dataclass(frozen=True)
class Row:
    """Medians of one workload on one system."""

    workload: str
    system: str
    requests: int
    decode_tokens_per_s: float
    tbt_p50_ms: float
    tbt_p99_ms: float
    attention_busy: float


def run_all(args: argparse.Namespace) -> list[Row]:
    config = json.loads((args.model / "config.json").read_text())
    workloads = [Workload.parse(text) for text in args.workloads]
    engine = {
        "model": str(args.model),
        "dtype": args.dtype,
        "max_model_len": config["max_position_embeddings"],
        "max_num_seqs": 2 * max(w.batch for w in workloads),
        "gpu_memory_utilization": 0.2,
        "enforce_eager": args.enforce_eager,
        "skip_tokenizer_init": True,
    }
    tokens = max(2 * w.batch * (w.context + args.output_tokens + 256) for w in workloads)
    pool = int(1.5 * tokens * kv_bytes_per_token(config, args.dtype))
    rows = []
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(
                Engine(system, engine, pool, args.output / f"{system.name.replace(' ', '-')}.log")
            )
            for system in (ONE, TWO)
        ]
        for workload in workloads:
            runs: dict[str, list[dict[str, float]]] = {engine.system.name: [] for engine in engines}
            for _ in range(args.repeats):
                for running in engines:
                    lanes = 2 if running.system is TWO else 1
                    batch = Workload(workload.context, lanes * workload.batch)
                    runs[running.system.name].append(
                        running.run(batch.prompts(config["vocab_size"]), args.output_tokens)
                    )
            for system, measured in runs.items():
                keys = ("decode_tokens_per_s", "tbt_p50_ms", "tbt_p99_ms", "attention_busy")
                medians = {key: statistics.median(run[key] for run in measured) for key in keys}
                requests = workload.batch * (2 if system == TWO.name else 1)
                rows.append(Row(workload.name, system, requests, **medians))
                print(rows[-1], flush=True)
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| context x batch per lane | one lane, tokens/s | two lanes, tokens/s | speed-up (limit 2) "
        "| TBT p50, one / two, ms | TBT p99, one / two, ms | attention worker busy, one / two |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {one.workload} | {one.decode_tokens_per_s:.1f} | {two.decode_tokens_per_s:.1f} "
            f"| {two.decode_tokens_per_s / one.decode_tokens_per_s:.2f} | {one.tbt_p50_ms:.0f} / {two.tbt_p50_ms:.0f} "
            f"| {one.tbt_p99_ms:.0f} / {two.tbt_p99_ms:.0f} | {one.attention_busy:.0%} / {two.attention_busy:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face directory")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--workloads", nargs="+", metavar="CONTEXTxBATCH", help="batch per lane")
    parser.add_argument("--output-tokens", type=int, default=48, help="per request (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each workload (default: %(default)s)")
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--quick", action="store_true", help="one workload, not compiled")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory for JSON, PNG, logs")
    args = parser.parse_args()
    args.workloads = args.workloads or (QUICK if args.quick else FULL)
    args.enforce_eager = args.enforce_eager or args.quick
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    rows = run_all(args)
    results = {
        "machine": machine,
        "options": {k: str(v) for k, v in vars(args).items()},
        "rows": [asdict(r) for r in rows],
    }
    (args.output / "staggering.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nDecode, one core a side\n\n{table(rows)}")
    values = {(row.workload, row.system): row.decode_tokens_per_s for row in rows}
    plot(values, "Decode tokens/s, same batch per lane", machine["cpu"], args.output / "staggering.png")


if __name__ == "__main__":
    main()
