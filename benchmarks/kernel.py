"""Achieved KV bandwidth of the attention kernel, as a fraction of a linear read of the same memory.

    python benchmarks/kernel.py --output results [--cpus 0,1] [--quick]

Decode rows: the fraction of linear for this kernel and, if vLLM is installed, for vLLM's own CPU op on the
same huge pages. The three are timed in turn and every repetition gives its own ratios, of which the median
counts: load on the machine then hits all three. Successive calls read different layers of a pool far larger
than the caches. Prefill rows: GFLOP/s of many query tokens over a context. Writes kernel.json and kernel.png.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lamina_benchmarks import linear_read

from vllm_lamina.kernels import BFLOAT16_ISAS, Arena, AttentionKernel, ScoreRule, ThreadPool

POOL_BYTES = 1 << 30
BLOCK_SIZE = 128
HEAD_SIZE = 128
NUM_KV_HEADS = 8
HAS_VLLM = importlib.util.find_spec("vllm") is not None
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Case:
    """One row: every request has the same context and query length."""

    dtype: str
    threads: int
    group: int
    batch: int
    context: int
    query_len: int = 1

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one call has to read."""
        return self.batch * self.context * NUM_KV_HEADS * HEAD_SIZE * 2 * ELEMENT_BYTES[self.dtype]

    @property
    def flops(self) -> int:
        """Multiplications and additions of both matrix products."""
        return 4 * self.batch * self.query_len * self.context * self.group * NUM_KV_HEADS * HEAD_SIZE


class Pool:
    """A pool of finite values that every contender reads through its own block layout."""

    def __init__(self, dtype: str) -> None:
        self.memory = Arena(POOL_BYTES).array()
        values = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
        bits = (
            values.view(np.uint8) if dtype == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)
        )
        self.memory.reshape(-1, bits.nbytes)[:] = bits.view(np.uint8)

    def layers(self, case: Case) -> int:
        """How many calls can read memory of their own."""
        return len(self.memory) // case.kv_bytes

    def layer(self, case: Case, call: int) -> np.ndarray:
        """Memory of one call."""
        begin = call % self.layers(case) * case.kv_bytes
        return self.memory[begin : begin + case.kv_bytes]


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random queries (float32) and block tables in random order."""
    rng = np.random.default_rng(1)
    queries = rng.standard_normal(
        (case.batch * case.query_len, case.group * NUM_KV_HEADS, HEAD_SIZE), np.float32
    )
    blocks = rng.permutation(case.batch * case.context // BLOCK_SIZE).astype(np.int32)
    return queries, blocks.reshape(case.batch, -1)


def lamina_call(case: Case, pool: Pool, threads: ThreadPool, isa: str | None) -> Callable[[int], object]:
    """Return this kernel's attend call on layer n."""
    kernel = AttentionKernel(case.dtype, case.group * NUM_KV_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, isa)
    q, tables = inputs(case)
    if case.dtype == "bfloat16":
        q = (q.view(np.uint32) >> 16).astype(np.uint16)
    starts = np.arange(case.batch + 1, dtype=np.int32) * case.query_len
    lens = np.full(case.batch, case.context, np.int32)
    rule, blocks = ScoreRule(HEAD_SIZE**-0.5), (-1, kernel.block_bytes)
    return lambda n: kernel.attend(
        pool.layer(case, n).reshape(blocks), q, starts, lens, tables, rule, threads
    )


def vllm_call(case: Case, pool: Pool) -> Callable[[int], object]:
    """Return vLLM's CPU op on layer n."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    torch.set_num_threads(case.threads)
    dtype = getattr(torch, case.dtype)
    memory = torch.from_numpy(pool.memory).view(dtype)
    q, tables = (torch.from_numpy(x) for x in inputs(case))
    q = q.to(dtype)
    out = torch.empty_like(q)
    starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.query_len
    lens = torch.full((case.batch,), case.context, dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.batch,
        num_heads=case.group * NUM_KV_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_SIZE,
        seq_lens=lens,
        dtype=dtype,
        query_start_loc=starts,
        causal=False,
        sliding_window_size=-1,
        isa=_get_attn_isa(dtype, BLOCK_SIZE, HEAD_SIZE),
        enable_kv_split=True,
    )
    elements = case.kv_bytes // ELEMENT_BYTES[case.dtype]

    def call(n: int) -> None:
        begin = n % pool.layers(case) * elements
        cache = memory[begin : begin + elements].view(-1, NUM_KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE)
        keys, values = cache.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=starts,
            seq_lens=lens,
            scale=HEAD_SIZE**-0.5,
            causal=False,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=tables,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    return call


def time_call(call: Callable[[int], object], first: int, calls: int) -> float:
    """Seconds per call over successive layers, threads awake and the other contenders' asleep."""
    time.sleep(0.005)
    call(first - 1)
    begin = time.perf_counter()
    for n in range(first, first + calls):
        call(n)
    return (time.perf_counter() - begin) / calls


def measure(case: Case, pool: Pool, threads: ThreadPool, repetitions: int, isa: str | None) -> dict[str, Any]:
    """Time all contenders of one case in turn; medians of the paired ratios."""
    contenders: dict[str, Callable[[int], object]] = {
        "linear": lambda n: linear_read(pool.layer(case, n), threads._native),
        "lamina": lamina_call(case, pool, threads, isa),
    }
    if HAS_VLLM:
        contenders["vllm"] = vllm_call(case, pool)
    if case.query_len > 1:
        del contenders["linear"]
    calls = max(1, min(pool.layers(case), (256 << 20) // case.kv_bytes)) if case.query_len == 1 else 1
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repetitions):
        for name, call in contenders.items():
            seconds[name].append(time_call(call, 1 + repetition * calls, calls))
    row: dict[str, Any] = asdict(case)
    for name, times in seconds.items():
        row[f"{name}_ms"] = 1e3 * statistics.median(times)
        if case.query_len == 1:
            row[f"{name}_gb_s"] = case.kv_bytes / statistics.median(times) / 1e9
            row[name] = statistics.median(a / b for a, b in zip(seconds["linear"], times, strict=True))
        else:
            row[name] = case.flops / statistics.median(times) / 1e9
    if "vllm" in seconds:
        row["speedup"] = statistics.median(
            a / b for a, b in zip(seconds["vllm"], seconds["lamina"], strict=True)
        )
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Print both tables."""
    decode = [r for r in rows if r["query_len"] == 1]
    prefill = [r for r in rows if r["query_len"] > 1]
    print("\nDecode: KV bytes/s as a fraction of a linear read")
    print("dtype     thr group batch context | linear GB/s  lamina   vllm  lamina/vllm")
    for r in decode:
        print(
            f"{r['dtype']:9} {r['threads']:3} {r['group']:5} {r['batch']:5} {r['context']:7} |"
            f" {r['linear_gb_s']:11.1f} {r['lamina']:7.2f} {r.get('vllm', np.nan):6.2f}"
            f" {r.get('speedup', np.nan):12.2f}"
        )
    print("\nPrefill over context: GFLOP/s")
    print("dtype     thr group query context |  lamina    vllm  lamina/vllm")
    for r in prefill:
        print(
            f"{r['dtype']:9} {r['threads']:3} {r['group']:5} {r['query_len']:5} {r['context']:7} |"
            f" {r['lamina']:7.0f} {r.get('vllm', np.nan):7.0f} {r.get('speedup', np.nan):12.2f}"
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the fraction of linear over the context, one panel per dtype and number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decode = [r for r in rows if r["query_len"] == 1 and r["batch"] == 8]
    panels = sorted({(r["dtype"], r["threads"]) for r in decode})
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for group, marker in ((4, "o"), (8, "s")):
            points = [r for r in decode if (r["dtype"], r["threads"]) == panel and r["group"] == group]
            contexts = [r["context"] for r in points]
            for name, colour in (("lamina", "C0"), ("vllm", "C1")):
                if points and name in points[0]:
                    label = f"{name}, group {group}"
                    axis.plot(contexts, [r[name] for r in points], marker=marker, color=colour, label=label)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{panel[0]}, {panel[1]} thread{'s' if panel[1] > 1 else ''}")
        axis.set_xlabel("context [tokens]")
    axes[0][0].set_ylabel("fraction of a linear read")
    axes[0][0].set_ylim(0, 1.1)
    axes[0][0].legend()
    figure.suptitle("Decode attention, batch 8, head size 128, 8 KV heads")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cases(quick: bool, threads: list[int]) -> list[Case]:
    """List the rows of the table."""
    contexts = (8192,) if quick else (512, 2048, 8192)
    batches = (8,) if quick else (1, 8, 32)
    rows = [
        Case(dtype, count, group, batch, context)
        for dtype in ("bfloat16", "float32")
        for count in threads
        for group in (4, 8)
        for batch in batches
        for context in contexts
        if batch == 8 or (dtype == "bfloat16" and context == 2048)
    ]
    rows += [
        Case(dtype, count, 4, 1, 2048, query_len)
        for dtype in ("bfloat16", "float32")
        for count in threads
        for query_len in ((512,) if quick else (32, 512, 2048))
    ]
    return rows


def main() -> None:
    """Measure, print, and write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path(), help="directory for kernel.json and kernel.png"
    )
    parser.add_argument(
        "--cpus", default="0,1", help="CPU of each thread; measured with one and with all of them"
    )
    parser.add_argument("--isa", help="kernel variant, by default the best one")
    parser.add_argument("--repetitions", type=int, default=0, help="default 15, with --quick 7")
    parser.add_argument("--quick", action="store_true", help="only 8K tokens of context, batch 8")
    options = parser.parse_args()
    cpus = [int(cpu) for cpu in options.cpus.split(",")]
    # Read by OpenMP when torch is loaded: vLLM's threads on the same CPUs as ours.
    os.environ["OMP_PLACES"] = ",".join(f"{{{cpu}}}" for cpu in cpus)
    os.environ["OMP_PROC_BIND"] = "true"
    if HAS_VLLM:
        # Before this thread is pinned, or OpenMP sees one CPU only.
        import vllm._custom_ops  # noqa: F401
    repetitions = options.repetitions or (7 if options.quick else 15)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for dtype in ("bfloat16", "float32"):
        pool = Pool(dtype)
        for case in cases(options.quick, sorted({1, len(cpus)})):
            if case.dtype != dtype or (options.isa in BFLOAT16_ISAS and dtype != "bfloat16"):
                continue
            threads = ThreadPool(case.threads, cpus[: case.threads])
            threads.pin_caller()
            count = repetitions if case.query_len == 1 else max(3, repetitions // 3)
            rows.append(measure(case, pool, threads, count, options.isa))
            (options.output / "kernel.json").write_text(json.dumps(rows, indent=1) + "\n")
    report(rows)
    plot(rows, options.output / "kernel.png")


if __name__ == "__main__":
    main()
