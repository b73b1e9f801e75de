#!/usr/bin/env python
"""One batch in flight against two: the same model, one core a side, the same batch *per lane*.

With one lane `batch` requests decode; with two, twice as many, in two lanes. Each side then works on one batch while
the other side works on the other. With t_m and t_a, what a step costs the model worker and the attention worker, one
lane takes t_m + t_a a step and two lanes at best 2 max(t_m, t_a) for two steps: the ideal speed-up is
(t_m + t_a) / max(t_m, t_a), 2 where they are equal. The engines take turns run by run; each figure is a median.

- balance: the context length at which t_a is t_m, found by measuring, for each model.
- ratio: other context lengths, so that t_a / t_m goes from a quarter to two.
- latency: what a slower network would cost: latency injected into each layer's exchange, at half of the balanced
  context.

The KV cache of the prompts is filled by copies, not computed. With --one-prompt all requests share the blocks of one
prompt, which attention then reads from the CPU's cache: on one machine both sides share its memory, which the devices
that Lamina is for do not.

    python benchmarks/staggering.py --output results                              # 20 minutes
    python benchmarks/staggering.py --output results --parts balance --models .models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from report import add_engine_options, describe_machine, write_results
from systems import DEFAULT_MODEL, RANDOM_1B, Engine, Model, System, Workload, lamina

PARTS = ("balance", "ratio", "latency")
RATIOS = (0.25, 0.5, 1.5, 2.0)
LATENCIES_US = (0, 50, 200, 1000)
BLOCK = 128


@dataclass(frozen=True)
class Row:
    """One workload with one lane and with two: medians."""

    part: str
    model: str
    workload: str
    latency_us: int
    model_ms: float
    """Of a step, on the model worker."""
    attention_ms: float
    """Of a step, on the attention worker, with one lane: while the model worker waits."""
    beside_model_ms: float
    """The same with two lanes: while the model worker computes. It is longer where both want the same memory."""
    one: dict[str, float]
    two: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.attention_ms / self.model_ms

    @property
    def speed_up(self) -> float:
        return self.two["decode_tokens_per_s"] / self.one["decode_tokens_per_s"]

    @property
    def ideal(self) -> float:
        """Without injected latency."""
        return (self.model_ms + self.attention_ms) / max(self.model_ms, self.attention_ms)


@dataclass
class Pair:
    """An engine with one lane and one with two, on the same cores."""

    name: str
    model: Model
    latency_us: int
    one: Engine
    two: Engine
    output_tokens: int
    one_prompt: bool

    def prompts(self, workload: Workload) -> list[list[int]]:
        prompts = workload.prompts(self.model.vocab_size)
        return prompts[:1] * workload.batch if self.one_prompt else prompts

    def measure(self, part: str, workload: Workload, repeats: int) -> Row:
        runs: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
        for _ in range(repeats):
            for name, engine, lanes in (("one", self.one, 1), ("two", self.two, 2)):
                prompts = self.prompts(Workload(workload.context, lanes * workload.batch))
                runs[name].append(engine.run(prompts, self.output_tokens))
        one, two = (_medians(runs[name]) for name in ("one", "two"))
        step_ms = 1000 * workload.batch / one["decode_tokens_per_s"]
        exchange_ms = self.latency_us * self.model.config["num_hidden_layers"] / 1000
        attention_ms = one["attention_busy"] * step_ms
        model_ms = step_ms - attention_ms - exchange_ms
        beside_model_ms = two["attention_busy"] * 1000 * workload.batch / two["decode_tokens_per_s"]
        row = Row(
            part, self.name, workload.name, self.latency_us, model_ms, attention_ms, beside_model_ms, one, two
        )
        print(
            f"{part}: {self.name} {workload.name} +{self.latency_us} us: {row.speed_up:.2f} of {row.ideal:.2f}",
            flush=True,
        )
        return row

    def balanced_context(self, batch: int, guess: int) -> int:
        """The context length at which the attention worker takes as long for a step as the model worker."""
        prompts = self.prompts(Workload(guess, batch))
        busy = self.one.run(prompts, self.output_tokens)["attention_busy"]
        return self.whole_blocks(guess * (1 - busy) / busy, batch)

    def whole_blocks(self, context: float, batch: int) -> int:
        """The nearest number of tokens that fills blocks, and fits."""
        room = self.two.pool_bytes / (2 * batch * self.model.kv_bytes_per_token) - 2 * BLOCK
        room = min(room, self.model.config["max_position_embeddings"] - 2 * BLOCK)
        return max(BLOCK, BLOCK * round(min(context, room) / BLOCK))


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    keys = ("decode_tokens_per_s", "tbt_p50_ms", "tbt_p99_ms", "attention_busy")
    return {key: statistics.median(run[key] for run in runs) for key in keys}


@contextlib.contextmanager
def pair(args: argparse.Namespace, path: Path, pool_bytes: int, latency_us: int) -> Iterator[Pair]:
    model = Model(path, args.dtype)
    options = model.engine(max_num_seqs=2 * args.batch, enforce_eager=args.enforce_eager)
    systems = [
        lamina("one lane", latency_us=latency_us, lamina_batches=1),
        lamina("two lanes", latency_us=latency_us, lamina_stagger="always"),
    ]
    with contextlib.ExitStack() as stack:

        def start(system: System, pool: int) -> Engine:
            log = args.output / f"{path.name}-{system.name.replace(' ', '-')}.log"
            return stack.enter_context(Engine(system, options, pool, log))

        one, two = start(systems[0], pool_bytes // 2), start(systems[1], pool_bytes)
        yield Pair(path.name, model, latency_us, one, two, args.output_tokens, args.one_prompt)


def run_all(args: argparse.Namespace) -> list[Row]:
    rows = []
    for index, path in enumerate(args.models):
        parts = args.parts if index == 0 else [part for part in args.parts if part == "balance"]
        with pair(args, path, args.pool_gib << 30, 0) as engines:
            balanced = engines.balanced_context(args.batch, args.guess)
            if "balance" in parts:
                rows.append(engines.measure("balance", Workload(balanced, args.batch), args.repeats))
            if "ratio" in parts:
                for ratio in RATIOS:
                    context = engines.whole_blocks(ratio * balanced, args.batch)
                    rows.append(engines.measure("ratio", Workload(context, args.batch), args.repeats))
        for latency_us in LATENCIES_US if "latency" in parts else ():
            with pair(args, path, args.pool_gib << 30, latency_us) as engines:
                context = engines.whole_blocks(balanced / 2, args.batch)
                rows.append(engines.measure("latency", Workload(context, args.batch), args.repeats))
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| part | model | context x batch per lane | injected latency, us | t_a / t_m | one lane, tokens/s "
        "| two lanes, tokens/s | speed-up | ideal | TBT p50, one / two, ms | TBT p99, one / two, ms "
        "| attention worker busy, one / two | a step's attention, one / two, ms |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        one, two = row.one, row.two
        lines.append(
            f"| {row.part} | {row.model} | {row.workload} | {row.latency_us} | {row.ratio:.2f} "
            f"| {one['decode_tokens_per_s']:.1f} | {two['decode_tokens_per_s']:.1f} "
            f"| {row.speed_up:.2f} | {row.ideal:.2f} "
            f"| {one['tbt_p50_ms']:.0f} / {two['tbt_p50_ms']:.0f} | {one['tbt_p99_ms']:.0f} / {two['tbt_p99_ms']:.0f} "
            f"| {one['attention_busy']:.0%} / {two['attention_busy']:.0%} "
            f"| {row.attention_ms:.0f} / {row.beside_model_ms:.0f} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], file: Path, subtitle: str) -> None:
    """Speed-up over t_a / t_m against the ideal, and tokens/s over injected latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ratio_axes, latency_axes) = pyplot.subplots(1, 2, figsize=(11, 4))
    measured = sorted(
        (row for row in rows if row.part in ("balance", "ratio")), key=lambda row: (row.model, row.ratio)
    )
    for index, model in enumerate(dict.fromkeys(row.model for row in measured)):
        points = [row for row in measured if row.model == model]
        ratio_axes.plot(
            [r.ratio for r in points], [r.speed_up for r in points], "o-", color=f"C{index}", label=model
        )
    if measured:
        ratios = [0.1 * i for i in range(1, 26)]
        ratio_axes.plot(ratios, [(1 + r) / max(1, r) for r in ratios], "--", color="grey", label="ideal")
        ratio_axes.set_xlabel("t_a / t_m of a step")
        ratio_axes.set_ylabel("tokens/s of two lanes over one")
        ratio_axes.legend(fontsize=8)
    delayed = [row for row in rows if row.part == "latency"]
    for name, label in (("one", "one lane"), ("two", "two lanes")):
        values = [getattr(row, name)["decode_tokens_per_s"] for row in delayed]
        latency_axes.plot([row.latency_us for row in delayed], values, "o-", label=label)
    latency_axes.set_xlabel("latency injected into each layer's exchange, us")
    latency_axes.set_ylabel("decode tokens/s")
    latency_axes.set_ylim(bottom=0)
    latency_axes.legend(fontsize=8)
    figure.suptitle(f"Two staggered batches\n{subtitle}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        type=Path,
        nargs="+",
        default=[DEFAULT_MODEL, RANDOM_1B],
        help="Hugging Face directories; the sweeps use the first (default: the real model, a random one of 1B)",
    )
    parser.add_argument("--batch", type=int, default=16, help="requests per lane (default: %(default)s)")
    parser.add_argument(
        "--guess", type=int, default=1024, help="first context length tried (default: %(default)s)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output-tokens", type=int, default=32, help="per request (default: %(default)s)")
    parser.add_argument("--one-prompt", action="store_true", help="for all requests")
    parser.add_argument("--pool-gib", type=int, default=6, help="KV pool of two lanes (default: %(default)s)")
    add_engine_options(parser)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    rows = run_all(args)
    values = [
        asdict(row) | {"ratio": row.ratio, "speed_up": row.speed_up, "ideal": row.ideal} for row in rows
    ]
    write_results(args.output / "staggering.json", machine, args, values)
    draw(rows, args.output / "staggering.png", machine["cpu"])
    print(f"\nDecode, one core a side\n\n{table(rows)}")


if __name__ == "__main__":
    main()
