#!/usr/bin/env python
"""What a layer costs the model worker's core outside of kernels and waiting: Python, packing, hand-over between lanes.

The attention layers of a model, without the model: each decode step sends q, k, v of every layer to a real attention
worker on another core and takes the output, as `LaminaAttentionImpl` does in a model. Who waits sleeps at once, so that
the CPU time of the lanes' threads is what the exchange costs the core, with the system calls of sleeping and waking.
Contexts are short: the attention itself takes little, and none of this core.

    python benchmarks/layer_cost.py --output results          # two minutes
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
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
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection

BLOCK_SIZE = 128
SHAPES = {
    "SmolLM2-135M (9 heads, 3 KV heads of 64)": (9, 3, 64),
    "Llama-3.2-1B (32 heads, 8 KV heads of 64)": (32, 8, 64),
    "Llama-3-8B (32 heads, 8 KV heads of 128)": (32, 8, 128),
}
BATCHES = (1, 8, 32, 64)
NUM_LAYERS = 32
TIMEOUT = 30.0


@dataclass(frozen=True)
class Row:
    """Microseconds of the model worker's core per layer and batch, medians over steps."""

    shape: str
    batch: int
    one_lane_us: float
    two_lanes_us: float


class Lane:
    """Decode steps of one lane, through the attention backend."""

    def __init__(
        self, index: int, exchange: Exchange, client: AttentionClient, geometry: Geometry, batch: int
    ) -> None:
        self._index, self._exchange, self._client = index, exchange, client
        self._geometry, self._batch = geometry, batch
        shape = (
            geometry.layers[0].num_heads,
            geometry.caches[0].head_size,
            geometry.layers[0].scale,
            geometry.caches[0].num_kv_heads,
        )
        self._impl = LaminaAttentionImpl(*shape)
        heads = geometry.layers[0].num_heads + 2 * geometry.caches[0].num_kv_heads
        qkv = torch.randn(batch, heads * geometry.caches[0].head_size, dtype=torch.bfloat16)
        parts = qkv.split([n * geometry.caches[0].head_size for n in self._heads()], dim=1)
        self._qkv = [part.view(batch, -1, geometry.caches[0].head_size) for part in parts]
        self._out = torch.empty(
            batch, geometry.layers[0].num_heads, geometry.caches[0].head_size, dtype=torch.bfloat16
        )
        self._layers = [SimpleNamespace(layer_name=f"{i}") for i in range(geometry.num_layers)]
        self.cpu_us: list[float] = []

    def _heads(self) -> tuple[int, int, int]:
        return (
            self._geometry.layers[0].num_heads,
            self._geometry.caches[0].num_kv_heads,
            self._geometry.caches[0].num_kv_heads,
        )

    def run(self, steps: int, start: threading.Barrier) -> None:
        client = self._client
        start.wait(TIMEOUT)
        with torch.inference_mode():
            for step in range(steps):
                client.join_turn(self._index)
                client.begin_turn(self._index, TIMEOUT)
                metadata = self._begin_step(context=1 + step % (BLOCK_SIZE - 1))
                begin = time.thread_time_ns()
                for layer in self._layers:
                    self._impl.forward(layer, *self._qkv, torch.empty(0), metadata, self._out)  # type: ignore[arg-type]
                self.cpu_us.append((time.thread_time_ns() - begin) / len(self._layers) / 1000)
                client.end_turn(self._index)

    def _begin_step(self, context: int) -> LaminaMetadata:
        first = self._index * self._batch
        requests = {
            f"{i}": PlannedRequest(context, 1, (np.array([first + i], np.int32),)) for i in range(self._batch)
        }
        step = Step(StepPlan(requests, lambda: list(requests)), self._geometry)
        step.send_once(self._client, self._index, TIMEOUT)
        return LaminaMetadata(self._exchange, self._index, step)


def measure(shape: tuple[int, int, int], batch: int, num_lanes: int, steps: int, cpus: list[int]) -> float:
    geometry = Geometry.uniform(NUM_LAYERS, BLOCK_SIZE, *shape, "bfloat16", (shape[2] ** -0.5,) * NUM_LAYERS)
    worker = EmbeddedAttentionWorker.start(2 << 30, cpus[1:])
    try:
        with AttentionWorkerConnection.connect(worker.address) as connection:
            connection.configure(geometry, 2 * batch, spin_us=0, worker_spin_us=2000)
            exchange = Exchange(device_for("cpu"), TIMEOUT).activate()
            partition = Partition.by_heads(geometry.to_native(), [[geometry.caches[0].num_kv_heads]])
            client = AttentionClient([connection.channel], partition)
            exchange.open(
                HostLayers(client, TIMEOUT, ranks_wait=False), [f"{i}" for i in range(NUM_LAYERS)], geometry
            )
            lanes = [Lane(index, exchange, client, geometry, batch) for index in range(num_lanes)]
            start = threading.Barrier(num_lanes)
            run = [threading.Thread(target=lane.run, args=(steps, start)) for lane in lanes]
            for thread in run:
                thread.start()
            for thread in run:
                thread.join()
            exchange.deactivate()
    finally:
        worker.stop()
    return statistics.median([us for lane in lanes for us in lane.cpu_us[steps // 5 :]])


def table(rows: list[Row]) -> str:
    lines = ["| model | batch | one lane, us a layer | two lanes, us a layer |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row.shape} | {row.batch} | {row.one_lane_us:.0f} | {row.two_lanes_us:.0f} |" for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="decode steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory for the JSON")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    cpus = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cpus[:1])
    torch.set_num_threads(1)
    rows = [
        Row(name, batch, *(measure(shape, batch, lanes, args.steps, cpus) for lanes in (1, 2)))
        for name, shape in SHAPES.items()
        for batch in BATCHES
    ]
    write_results(args.output / "layer_cost.json", machine, args, [asdict(row) for row in rows])
    print(f"CPU time of the model worker's core per layer and batch, outside of kernels\n\n{table(rows)}")


if __name__ == "__main__":
    main()
