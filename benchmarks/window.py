#!/usr/bin/env python
"""What a decode layer with a sliding window takes beside one with full attention, at the same context.

Layers of both kinds, in one model's geometry, on a real attention worker with a core of its own: each step sends q, k
and v of every layer and waits for the output, kind after kind, so that whatever else changes on the machine changes for
all. A figure is the median time of a layer: the exchange, the append and the attention. A kind has several layers, so
that none finds its keys in the caches from the step before, where they are larger than these.

    python benchmarks/window.py --output results          # two minutes, 4 GiB of memory
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from report import describe_machine, write_results

from vllm_lamina._native import AttentionClient, Partition
from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.attention_backend.host_layers import HostLayers
from vllm_lamina.attention_backend.impl import LaminaAttentionImpl
from vllm_lamina.attention_backend.metadata import LaminaMetadata
from vllm_lamina.attention_backend.step import PlannedRequest, Step, StepPlan
from vllm_lamina.device import device_for
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, LayerSpec
from vllm_lamina.transport.connection import AttentionWorkerConnection

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 128
DTYPE = "bfloat16"
KINDS = (0, 4096, 1024, 128)
"""Windows; 0 is full attention. As in Mistral 7B, Gemma 3 and gpt-oss."""
LAYERS_PER_KIND = 2
TIMEOUT = 30.0


@dataclass(frozen=True)
class Row:
    """A layer of one kind: median microseconds, of full attention's, and the bytes of K and V that it attends."""

    context: int
    window: int
    layer_us: float
    of_full: float
    kv_mib: float


def geometry() -> Geometry:
    """A group for each kind; the layers of all overlay one another's blocks, as in vLLM."""
    return Geometry(
        caches=(CacheSpec(BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE, HEAD_SIZE, DTYPE),),
        layers=tuple(
            LayerSpec(0, group, position, NUM_HEADS, HEAD_SIZE**-0.5, window=window)
            for group, window in enumerate(KINDS)
            for position in range(LAYERS_PER_KIND)
        ),
    )


def block_ids(context: int, batch: int) -> list[tuple[np.ndarray, ...]]:
    """Of each request, by group: the blocks that a window sees; those before it are vLLM's null block, 0."""
    first_free = 1
    tables: list[list[np.ndarray]] = [[] for _ in range(batch)]
    for window in KINDS:
        for table in tables:
            table.append(np.zeros(context // BLOCK_SIZE + 1, np.int32))
            first = max(0, context - window + 1) // BLOCK_SIZE if window else 0
            count = len(table[-1]) - first
            table[-1][first:] = np.arange(first_free, first_free + count)
            first_free += count
    return [tuple(table) for table in tables]


def measure(context: int, batch: int, steps: int, cpus: list[int]) -> list[Row]:
    """Time decode steps of ``batch`` requests with so much context."""
    model = geometry()
    ids = block_ids(context, batch)
    last = max(int(table.max()) for tables in ids for table in tables)
    worker = EmbeddedAttentionWorker.start((last + 2) * model.block_bytes() + (64 << 20), cpus[1:])
    try:
        with AttentionWorkerConnection.connect(worker.address) as connection:
            connection.configure(model, last + 1, spin_us=2000, worker_spin_us=2000)
            exchange = Exchange(device_for("cpu"), TIMEOUT).activate()
            client = AttentionClient(
                [connection.channel], Partition.by_heads(model.to_native(), [[NUM_KV_HEADS]])
            )
            names = [f"{i}" for i in range(model.num_layers)]
            exchange.open(HostLayers(client, TIMEOUT, ranks_wait=False), names, model)
            times = run(exchange, client, model, ids, context, steps)
            exchange.deactivate()
    finally:
        worker.stop()
    full = statistics.median(times[0])
    token = 2 * NUM_KV_HEADS * HEAD_SIZE * 2
    return [
        Row(
            context,
            window,
            statistics.median(us),
            statistics.median(us) / full,
            batch * min(window or context + 1, context + 1) * token / 2**20,
        )
        for window, us in zip(KINDS, times, strict=True)
    ]


def run(
    exchange: Exchange,
    client: AttentionClient,
    model: Geometry,
    ids: list[tuple[np.ndarray, ...]],
    context: int,
    steps: int,
) -> list[list[float]]:
    """Microseconds of each layer call, by kind."""
    requests = {f"{i}": PlannedRequest(context, 1, blocks) for i, blocks in enumerate(ids)}
    impls = [
        LaminaAttentionImpl(
            NUM_HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, NUM_KV_HEADS, sliding_window=window or None
        )
        for window in KINDS
    ]
    layers = [SimpleNamespace(layer_name=f"{i}") for i in range(model.num_layers)]
    q, k, v = (
        torch.randn(len(ids), heads, HEAD_SIZE, dtype=torch.bfloat16)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    out = torch.empty_like(q)
    times: list[list[float]] = [[] for _ in KINDS]
    with torch.inference_mode():
        for _ in range(steps):
            client.join_turn(0)
            client.begin_turn(0, TIMEOUT)
            step = Step(StepPlan(requests, lambda: list(requests)), model)
            step.send_once(client, 0, TIMEOUT)
            metadata = LaminaMetadata(exchange, 0, step)
            for index, layer in enumerate(layers):
                kind = model.layers[index].group
                begin = time.perf_counter_ns()
                impls[kind].forward(layer, q, k, v, torch.empty(0), metadata, out)  # type: ignore[arg-type]
                times[kind].append((time.perf_counter_ns() - begin) / 1000)
            client.end_turn(0)
    # The first layer of a step waits for the step's announcement too.
    return [us[steps // 5 * LAYERS_PER_KIND :] for us in times]


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| context | window | K and V attended, MiB | a layer, us | of full attention |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.context} | {row.window or 'none'} | {row.kv_mib:.0f} | {row.layer_us:.0f} | {row.of_full:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768], help="tokens")
    parser.add_argument("--batch", type=int, default=8, help="requests (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="decode steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory for the JSON")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    cpus = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cpus[:1])
    torch.set_num_threads(1)
    rows = [row for context in args.contexts for row in measure(context, args.batch, args.steps, cpus)]
    write_results(args.output / "window.json", machine, args, [asdict(row) for row in rows])
    print(
        f"Decode, batch {args.batch}, {NUM_HEADS} heads, {NUM_KV_HEADS} KV heads of {HEAD_SIZE}\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
