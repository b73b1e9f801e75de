#!/usr/bin/env python
"""Throughput of Lamina and of stock vLLM on one machine with two cores: same model, same requests, in turns.

The engines of all systems are started once and take turns run by run, so that whatever else changes on the machine
changes for all of them. The prompts of a workload are random tokens and the same in every run: the first run of a
workload prefills them, the later ones find them in the prefix cache. Decode throughput is the median of all runs,
total throughput that of the first run, which alone contains the prefill.

    python benchmarks/throughput.py --output results            # the full table, about half an hour
    python benchmarks/throughput.py --output results --quick    # a few minutes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from report import describe_machine, plot, table
from systems import Engine, System, two_core_systems

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / ".models" / "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Workload:
    """`batch` requests with `context` prompt tokens each."""

    context: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Reads CONTEXTxBATCH, such as 2048x8."""
        context, separator, batch = text.partition("x")
        if not separator:
            raise argparse.ArgumentTypeError(f"{text!r} is not CONTEXTxBATCH, such as 2048x8")
        return cls(int(context), int(batch))

    @property
    def name(self) -> str:
        return f"{self.context} x {self.batch}"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random tokens from the upper half of the vocabulary, where no special tokens are."""
        rng = random.Random(self.name)
        return [
            [rng.randrange(vocab_size // 2, vocab_size) for _ in range(self.context)]
            for _ in range(self.batch)
        ]


@dataclass(frozen=True)
class Measurement:
    """One workload on one system; tokens per second."""

    workload: str
    system: str
    decode: float
    decode_runs: list[float]
    total: float


FULL = [Workload(512, 8), Workload(512, 32), Workload(2048, 8), Workload(2048, 32), Workload(7936, 8)]
QUICK = [Workload(512, 8), Workload(2048, 8)]


def run_all(args: argparse.Namespace, systems: list[System]) -> list[Measurement]:
    config = json.loads((args.model / "config.json").read_text())
    limit = config["max_position_embeddings"]
    for workload in args.workloads:
        if workload.context + args.output_tokens > limit:
            raise SystemExit(f"{workload.name}: the model's limit is {limit} tokens with the output")
    engine = {
        "model": str(args.model),
        "dtype": args.dtype,
        "max_model_len": limit,
        "max_num_seqs": max(workload.batch for workload in args.workloads),
        "gpu_memory_utilization": 0.2,
        "enforce_eager": args.enforce_eager,
        "skip_tokenizer_init": True,
    }
    # Room for the prompts of one workload and of the one before, with what blocks round up.
    tokens = max(w.batch * (w.context + args.output_tokens + 256) for w in args.workloads)
    pool = 2 * tokens * kv_bytes_per_token(config, args.dtype)
    measurements = []
    with contextlib.ExitStack() as stack:
        engines = []
        for system in systems:
            print(f"starting: {system.name}", flush=True)
            log_file = args.output / f"{system.name.replace(', ', '-').replace(' ', '-')}.log"
            engines.append(stack.enter_context(Engine(system, engine, pool, log_file)))
        for workload in args.workloads:
            measurements += run_workload(workload, engines, config["vocab_size"], args)
    return measurements


def run_workload(
    workload: Workload, engines: list[Engine], vocab_size: int, args: argparse.Namespace
) -> list[Measurement]:
    prompts = workload.prompts(vocab_size)
    runs: dict[str, list[dict[str, float]]] = {engine.system.name: [] for engine in engines}
    for _ in range(args.repeats):
        for engine in engines:
            measured = engine.run(prompts, args.output_tokens)
            runs[engine.system.name].append(measured)
            print(f"{workload.name}, {engine.system.name}: {measured}", flush=True)
    return [
        Measurement(
            workload.name,
            system,
            decode=statistics.median(run["decode_tokens_per_s"] for run in measured_runs),
            decode_runs=[run["decode_tokens_per_s"] for run in measured_runs],
            total=measured_runs[0]["total_tokens_per_s"],
        )
        for system, measured_runs in runs.items()
    ]


def kv_bytes_per_token(config: dict[str, int], dtype: str) -> int:
    """Bytes of K and V of all layers for one token."""
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * heads * head_size * (4 if dtype == "float32" else 2)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face directory")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--workloads", type=Workload.parse, nargs="+", metavar="CONTEXTxBATCH")
    parser.add_argument("--output-tokens", type=int, help="per request (default: 96, quick 48)")
    parser.add_argument(
        "--repeats", type=int, help="runs of each workload on each system (default: 5, quick 3)"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--quick", action="store_true", help="fewer workloads and runs, not compiled")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory for JSON, PNG, logs")
    args = parser.parse_args()
    args.workloads = args.workloads or (QUICK if args.quick else FULL)
    args.output_tokens = args.output_tokens or (48 if args.quick else 96)
    args.repeats = args.repeats or (3 if args.quick else 5)
    args.enforce_eager = args.enforce_eager or args.quick
    return args


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    measurements = run_all(args, two_core_systems())
    results = {
        "machine": machine,
        "options": {key: str(value) for key, value in vars(args).items()},
        "measurements": [asdict(measurement) for measurement in measurements],
    }
    (args.output / "throughput.json").write_text(json.dumps(results, indent=2) + "\n")
    for quantity, title in (("decode", "Decode tokens/s"), ("total", "Total tokens/s, with prefill")):
        values = {(m.workload, m.system): getattr(m, quantity) for m in measurements}
        print(f"\n{title} (prompt tokens x requests)\n\n{table(values)}")
        plot(values, title, machine["cpu"], args.output / f"throughput-{quantity}.png")


if __name__ == "__main__":
    main()
