#!/usr/bin/env python
"""One engine's KV cache divided over 1, 2 and 4 attention workers, by each partition: bytes, messages, critical path.

All attention workers share a core here. So what is compared is not the throughput, which several machines would change,
but what a partition sends, and the CPU time that the slowest worker needs for its part: on machines of their own the
workers attend at the same time.

    python benchmarks/partition.py --output results            # the table of docs/partition.md
    python benchmarks/partition.py --output results --quick
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import add_engine_options, describe_machine, plot, write_results
from systems import DEFAULT_MODEL, Engine, Model, System, Workload, threads

from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker

PARTITIONS = ("head", "sequence", "request")
FULL = ["2048x8", "2048x32", "7936x8"]
QUICK = ["512x8"]
WORKER_CPU = 1
BLOCK_SIZE = 128


@dataclass(frozen=True)
class Row:
    """Medians of one workload on one division; bytes and messages are those of all workers together."""

    workload: str
    partition: str
    workers: int
    bytes_per_token: float
    formula_bytes_per_token: float
    messages_per_layer: float
    bytes_per_token_of_busiest: float
    critical_path_us_per_layer: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Shape:
    """What the formulas of docs/partition.md need of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    element: int

    @classmethod
    def of(cls, config: dict[str, Any], dtype: str) -> Shape:
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or config["hidden_size"] // heads,
            4 if dtype == "float32" else 2,
        )

    def wire_bytes(self, partition: str, workers: int, context: int) -> float:
        """Bytes of one token's decode step over all layers, without frame headers."""
        row = self.heads * self.head_size * self.element  # q, and the output
        kv = 2 * self.kv_heads * self.head_size * self.element
        holders = min(workers, -(-(context + 1) // BLOCK_SIZE)) if partition == "sequence" else 1
        lse = 4 * self.heads if holders > 1 else 0
        return self.layers * (holders * (2 * row + lse) + kv)


def run_all(args: argparse.Namespace) -> list[Row]:
    model = Model(args.model, args.dtype)
    shape = Shape.of(model.config, args.dtype)
    workloads = [Workload.parse(text) for text in args.workloads]
    # Room for the prompts of one workload and of the one before, and for the longest request that vLLM could be sent.
    tokens = max(2 * w.batch * (w.context + args.output_tokens + 2 * BLOCK_SIZE) for w in workloads)
    tokens = max(tokens, model.config["max_position_embeddings"] + 2 * BLOCK_SIZE)
    memory = int(1.5 * tokens * model.kv_bytes_per_token)
    engine = model.engine(max_num_seqs=max(w.batch for w in workloads), enforce_eager=args.enforce_eager) | {
        "block_size": BLOCK_SIZE
    }
    rows = []
    for count in args.workers:
        for partition in PARTITIONS if count > 1 else ("head",):
            if partition == "head" and shape.kv_heads < count:
                print(f"head, {count} workers: the model has {shape.kv_heads} KV heads", flush=True)
                continue
            rows += run_division(args, shape, model.vocab_size, engine, memory, partition, count)
    return rows


def run_division(
    args: argparse.Namespace,
    shape: Shape,
    vocab_size: int,
    engine: dict[str, Any],
    memory: int,
    partition: str,
    count: int,
) -> list[Row]:
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(count):
            workers.append(EmbeddedAttentionWorker.start(memory, [WORKER_CPU]))
            stack.callback(workers[-1].stop)
        options = {
            "executor": "lamina",
            "lamina_workers": ",".join(worker.address for worker in workers),
            "lamina_partition": partition,
            "lamina_batches": 1,
        }
        # Without CPUs of its own nobody polls: so the time that a worker is on the CPU is the time that its part takes,
        # whatever else runs there.
        system = System(f"{partition}-{count}", threads("nobind", 1), options)
        running = stack.enter_context(Engine(system, engine, 0, args.output / f"{system.name}.log"))
        rows = []
        for workload in (Workload.parse(text) for text in args.workloads):
            prompts = workload.prompts(vocab_size)
            pids = [worker.pid for worker in workers]
            runs = [
                row(
                    workload,
                    partition,
                    shape,
                    running.run(prompts, args.output_tokens, fill=False, worker_pids=pids),
                )
                for _ in range(args.repeats)
            ]
            rows.append(
                Row(
                    workload.name,
                    partition if count > 1 else "one worker",
                    count,
                    formula_bytes_per_token=shape.wire_bytes(partition, count, workload.context),
                    **{key: statistics.median(run[key] for run in runs) for key in runs[0]},
                )
            )
            print(rows[-1], flush=True)
        return rows


def row(workload: Workload, partition: str, shape: Shape, measured: dict[str, Any]) -> dict[str, float]:
    """What one run's counters say of one decode step, or one token."""
    workers, tokens = measured["attention_workers"], measured["decode_tokens"]
    layers = tokens / workload.batch * shape.layers
    sent = [worker["bytes_in"] + worker["bytes_out"] for worker in workers]
    return {
        "bytes_per_token": sum(sent) / tokens,
        # Each ATTEND is answered; the STEP in front of each step's layers is not counted.
        "messages_per_layer": 2 * sum(w["messages"] - w["steps"] for w in workers) / layers,
        "bytes_per_token_of_busiest": max(sent) / tokens,
        "critical_path_us_per_layer": max(worker["cpu_s"] for worker in workers) / layers * 1e6,
        "decode_tokens_per_s": measured["decode_tokens_per_s"],
    }


def table(rows: list[Row]) -> str:
    alone = {row.workload: row.critical_path_us_per_layer for row in rows if row.workers == 1}
    lines = [
        "| context x batch | partition | workers | bytes a token, all (formula) | bytes a token, busiest worker "
        "| messages a layer | slowest worker, us a layer | tokens/s, workers share a core |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        slowest = row.critical_path_us_per_layer
        gain = f" (1/{alone[row.workload] / slowest:.2f})" if row.workload in alone else ""
        lines.append(
            f"| {row.workload} | {row.partition} | {row.workers} | {row.bytes_per_token:,.0f} "
            f"({row.formula_bytes_per_token:,.0f}) | {row.bytes_per_token_of_busiest:,.0f} "
            f"| {row.messages_per_layer:.1f} | {slowest:,.0f}{gain} | {row.decode_tokens_per_s:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face directory")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of workers")
    parser.add_argument("--workloads", nargs="+", metavar="CONTEXTxBATCH")
    parser.add_argument("--output-tokens", type=int, default=32, help="per request (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one workload, not compiled")
    add_engine_options(parser)
    args = parser.parse_args()
    args.workloads = args.workloads or (QUICK if args.quick else FULL)
    args.enforce_eager = args.enforce_eager or args.quick
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    rows = run_all(args)
    write_results(args.output / "partition.json", machine, args, [asdict(row) for row in rows])
    print(f"\nDecode, by partition\n\n{table(rows)}")
    values = {(r.workload, f"{r.partition}, {r.workers}"): r.critical_path_us_per_layer for r in rows}
    plot(values, "Slowest attention worker, us a layer", machine["cpu"], args.output / "partition.png")


if __name__ == "__main__":
    main()
