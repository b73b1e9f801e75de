"""Round trips of the exchange between two processes: the bare channel by frame size, and attend() calls.

    python benchmarks/transport.py --cpus 0,1 --output results/

The first CPU is the model worker's, the second the attention worker's. A round trip writes a frame of the
given size, has the other process read it and write one of the same size, and reads that, all in place, as in
serving. Writes transport.json and transport.png.
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vllm_lamina._native import AttentionClient, ShmChannel, ShmEnd, create_shm_memory
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.messages import Geometry
from vllm_lamina.units import format_bytes, parse_cpus
from vllm_lamina.worker.embedded import EmbeddedAttentionWorker

SIZES = [64, 4 << 10, 64 << 10, 512 << 10, 4 << 20]
BATCH_SIZES = [1, 8, 32, 128]
CONTEXT = 16
SPIN_US = 2000


@dataclass(frozen=True)
class RoundTrip:
    """Percentiles of a series of round trips, in microseconds; `size` is bytes or requests."""

    size: int
    count: int
    minimum: float
    median: float
    p99: float

    @classmethod
    def of(cls, size: int, nanoseconds: list[int]) -> "RoundTrip":
        ordered = sorted(nanoseconds)
        return cls(
            size=size,
            count=len(ordered),
            minimum=ordered[0] / 1e3,
            median=statistics.median(ordered) / 1e3,
            p99=ordered[len(ordered) * 99 // 100] / 1e3,
        )


def echo(cpu: int, memory_fd: int, data_socket: socket.socket) -> None:
    os.sched_setaffinity(0, [cpu])
    ShmChannel(memory_fd, data_socket.fileno(), ShmEnd.WORKER, SPIN_US).echo_until_closed()


def measure_channel(cpus: list[int], count: int) -> list[RoundTrip]:
    memory_fd = create_shm_memory(64 << 20)
    here, there = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(target=echo, args=(cpus[1], memory_fd, there))
    process.start()
    there.close()
    os.sched_setaffinity(0, [cpus[0]])
    channel = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, SPIN_US)
    results = []
    for size in SIZES:
        repetitions = max(50, min(count, count * (64 << 10) // size))
        channel.ping_pong(size, repetitions // 10 + 5, 30.0)
        results.append(RoundTrip.of(size, channel.ping_pong(size, repetitions, 60.0)))
    channel.close()
    process.join(10.0)
    os.close(memory_fd)
    return results


def measure_attend(cpus: list[int], count: int) -> list[RoundTrip]:
    """Time decode steps' attend() calls: 8 query heads, 1 KV head of 128, bfloat16, 16 tokens of context."""
    geometry = Geometry(1, 64, 8, 1, 128, "bfloat16", (128**-0.5,))
    os.sched_setaffinity(0, [cpus[0]])
    worker = EmbeddedAttentionWorker.start(1 << 30, [cpus[1]])
    try:
        with AttentionWorkerConnection.connect(worker.address) as connection:
            connection.configure(geometry, max(BATCH_SIZES), spin_us=SPIN_US, worker_spin_us=SPIN_US)
            return [
                RoundTrip.of(batch, time_attend(connection.client, geometry, batch, count))
                for batch in BATCH_SIZES
            ]
    finally:
        worker.stop()


def time_attend(client: AttentionClient, geometry: Geometry, batch: int, count: int) -> list[int]:
    blocks = np.arange(batch, dtype=np.int32).reshape(batch, 1)
    slots = blocks[:, 0].astype(np.int64) * geometry.block_size + CONTEXT
    q = np.zeros((batch, geometry.num_heads, geometry.head_size), np.uint16)
    kv = np.zeros((batch, geometry.num_kv_heads, geometry.head_size), np.uint16)
    out = np.empty_like(q)
    ones = np.ones(batch, np.int32)
    client.begin_step(0, batch, ones, ones * CONTEXT, blocks, slots)
    rows = (q.ctypes.data, q.strides[0], kv.ctypes.data, kv.strides[0], kv.ctypes.data, kv.strides[0])
    arguments = (0, 0, *rows, out.ctypes.data, out.strides[0])
    round_trips = []
    for _ in range(count + 100):
        begin = time.perf_counter_ns()
        client.attend(*arguments)
        round_trips.append(time.perf_counter_ns() - begin)
    return round_trips[100:]


def plot(channel: list[RoundTrip], attend: list[RoundTrip], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, series, label in ((axes[0], channel, "bytes each way"), (axes[1], attend, "requests per step")):
        sizes = [point.size for point in series]
        axis.plot(sizes, [point.median for point in series], marker="o", label="median")
        axis.plot(sizes, [point.p99 for point in series], marker=".", linestyle=":", label="99th percentile")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="round trip, us")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_title("channel over shared memory")
    axes[1].set_title(f"attend(), {CONTEXT} tokens of context")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpus", type=parse_cpus, default=[0, 1], help="two CPUs (default: 0,1)")
    parser.add_argument(
        "--count", type=int, default=5000, help="round trips of small frames (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="directory (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if len(arguments.cpus) != 2:
        parser.error("--cpus needs two CPUs")

    channel = measure_channel(arguments.cpus, arguments.count)
    attend = measure_attend(arguments.cpus, arguments.count)
    for point in channel:
        print(
            f"channel {format_bytes(point.size):>8}: median {point.median:9.2f} us, p99 {point.p99:9.2f} us"
        )
    for point in attend:
        print(f"attend {point.size:>4} requests: median {point.median:8.2f} us, p99 {point.p99:9.2f} us")
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": platform.processor() or platform.machine(),
        "cpus": arguments.cpus,
        "channel_us": [asdict(point) for point in channel],
        "attend_us": [asdict(point) for point in attend],
    }
    (arguments.output / "transport.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(channel, attend, arguments.output / "transport.png")


if __name__ == "__main__":
    main()
