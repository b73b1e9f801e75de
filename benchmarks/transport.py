"""Round trips of the exchange between two processes: the bare channels by frame size, and attend() calls.

    python benchmarks/transport.py --cpus 0,1 --output results/

The first CPU is the model worker's, the second the attention worker's. A round trip writes a frame of the
given size, has the other process read it and write one of the same size, and reads that, all in place, as in
serving. Where UCX is installed the channel over UCX is measured too, over TCP on loopback, beside a ping-pong over
bare libucp with UCX's defaults, which neither writes nor reads what it carries; LAMINA_UCX_LIBRARY chooses the UCX.
Writes transport.json and transport.png.
"""

import argparse
import json
import multiprocessing
import os
import platform
import secrets
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from lamina_benchmarks import UcxPingPong, echo_until_closed, ping_pong

from vllm_lamina._native import (
    AttentionClient,
    Channel,
    Partition,
    ShmChannel,
    ShmEnd,
    UcxChannel,
    create_shm_memory,
)
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import UcxUnavailable
from vllm_lamina.transport.ucx import TOKEN_BYTES, describe_ucx, load_ucx
from vllm_lamina.units import format_bytes, parse_cpus

SIZES = [64, 4 << 10, 64 << 10, 512 << 10, 4 << 20]
BATCH_SIZES = [1, 8, 32, 128]
CONTEXT = 16
SPIN_US = 2000
RING_BYTES = 64 << 20
UCX_DEVICES, UCX_HOSTS = "lo", ["127.0.0.1"]


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


@dataclass(frozen=True)
class UcxRoundTrips:
    """The channel over UCX and bare libucp, in one run."""

    library: str
    channel: list[RoundTrip]
    bare: list[RoundTrip]


def repetitions(size: int, count: int) -> tuple[int, int]:
    """Round trips to warm up, and to measure."""
    measured = max(50, min(count, count * (64 << 10) // size))
    return measured // 10 + 5, measured


def round_trips(channel: Channel, count: int) -> list[RoundTrip]:
    results = []
    for size in SIZES:
        warm_up, measured = repetitions(size, count)
        ping_pong(channel, size, warm_up, 30.0)
        results.append(RoundTrip.of(size, ping_pong(channel, size, measured, 60.0)))
    return results


def echo(cpu: int, memory_fd: int, data_socket: socket.socket) -> None:
    os.sched_setaffinity(0, [cpu])
    echo_until_closed(ShmChannel(memory_fd, data_socket.fileno(), ShmEnd.WORKER, SPIN_US))


def measure_channel(cpus: list[int], count: int) -> list[RoundTrip]:
    memory_fd = create_shm_memory(RING_BYTES)
    here, there = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(target=echo, args=(cpus[1], memory_fd, there))
    process.start()
    there.close()
    os.sched_setaffinity(0, [cpus[0]])
    channel = ShmChannel(memory_fd, here.fileno(), ShmEnd.CLIENT, SPIN_US)
    results = round_trips(channel, count)
    channel.close()
    process.join(10.0)
    os.close(memory_fd)
    return results


def ucx_echo(cpu: int, pipe: Connection, token: bytes, count: int) -> None:
    os.sched_setaffinity(0, [cpu])
    try:
        library = load_ucx()
    except UcxUnavailable:
        return  # The other end says so.
    bare = UcxPingPong(library.path, max(SIZES), UCX_DEVICES)
    bare.admit(UCX_HOSTS)
    pipe.send(bare.address)
    bare.connect(pipe.recv())
    for size in SIZES:
        bare.echo(size, sum(repetitions(size, count)), 60.0)
    channel = UcxChannel(token, RING_BYTES, SPIN_US, UCX_DEVICES)
    channel.admit(UCX_HOSTS)
    pipe.send(channel.address)
    channel.connect(pipe.recv())
    echo_until_closed(channel)


def measure_ucx(cpus: list[int], count: int) -> UcxRoundTrips:
    pipe, child_pipe = multiprocessing.Pipe()
    token = secrets.token_bytes(TOKEN_BYTES)
    # Forked before this process loads UCX, which does not survive a fork.
    process = multiprocessing.get_context("fork").Process(
        target=ucx_echo, args=(cpus[1], child_pipe, token, count), daemon=True
    )
    process.start()
    child_pipe.close()
    os.sched_setaffinity(0, [cpus[0]])
    library = load_ucx()
    bare = UcxPingPong(library.path, max(SIZES), UCX_DEVICES)
    bare.admit(UCX_HOSTS)
    bare.connect(pipe.recv())
    pipe.send(bare.address)
    bare_results = []
    for size in SIZES:
        warm_up, measured = repetitions(size, count)
        bare.ping_pong(size, warm_up, 30.0)
        bare_results.append(RoundTrip.of(size, bare.ping_pong(size, measured, 60.0)))
    channel = UcxChannel(token, RING_BYTES, SPIN_US, UCX_DEVICES)
    channel.admit(UCX_HOSTS)
    channel.connect(pipe.recv())
    pipe.send(channel.address)
    channel.wait_connected(10.0)
    results = round_trips(channel, count)
    description = describe_ucx(library, channel)
    channel.close()
    process.join(10.0)
    return UcxRoundTrips(description, results, bare_results)


def measure_attend(cpus: list[int], count: int) -> list[RoundTrip]:
    """Time decode steps' attend() calls: 8 query heads, 1 KV head of 128, bfloat16, 16 tokens of context."""
    geometry = Geometry.uniform(1, 64, 8, 1, 128, "bfloat16", (128**-0.5,))
    os.sched_setaffinity(0, [cpus[0]])
    worker = EmbeddedAttentionWorker.start(1 << 30, [cpus[1]])
    try:
        with AttentionWorkerConnection.connect(worker.address) as connection:
            connection.configure(geometry, max(BATCH_SIZES), spin_us=SPIN_US, worker_spin_us=SPIN_US)
            partition = Partition.by_heads(geometry.to_native(), [[geometry.caches[0].num_kv_heads]])
            client = AttentionClient([connection.channel], partition)
            return [RoundTrip.of(batch, time_attend(client, geometry, batch, count)) for batch in BATCH_SIZES]
    finally:
        worker.stop()


def time_attend(client: AttentionClient, geometry: Geometry, batch: int, count: int) -> list[int]:
    blocks = np.arange(batch, dtype=np.int32).reshape(batch, 1)
    slots = blocks[:, 0].astype(np.int64) * geometry.block_size(0) + CONTEXT
    q = np.zeros((batch, geometry.layers[0].num_heads, geometry.caches[0].head_size), np.uint16)
    kv = np.zeros((batch, geometry.caches[0].num_kv_heads, geometry.caches[0].head_size), np.uint16)
    out = np.empty_like(q)
    ones = np.ones(batch, np.int32)
    client.begin_step(0, batch, ones, ones * CONTEXT, [(blocks, slots)])
    rows = (q.ctypes.data, q.strides[0], kv.ctypes.data, kv.strides[0], kv.ctypes.data, kv.strides[0])
    arguments = (0, 0, *rows, out.ctypes.data, out.strides[0])
    round_trips = []
    for _ in range(count + 100):
        begin = time.perf_counter_ns()
        client.attend(*arguments)
        round_trips.append(time.perf_counter_ns() - begin)
    return round_trips[100:]


def plot(channels: dict[str, list[RoundTrip]], attend: list[RoundTrip], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, lines, label in (
        (axes[0], channels, "bytes each way"),
        (axes[1], {"attend()": attend}, "requests per step"),
    ):
        for name, series in lines.items():
            sizes = [point.size for point in series]
            (line,) = axis.plot(sizes, [point.median for point in series], marker="o", label=name)
            p99 = [point.p99 for point in series]
            axis.plot(sizes, p99, marker=".", linestyle=":", color=line.get_color())
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="round trip, us: median, 99th percentile")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_title("channels")
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

    # UCX last: nothing forks after it is loaded.
    channels = {"shared memory": measure_channel(arguments.cpus, arguments.count)}
    attend = measure_attend(arguments.cpus, arguments.count)
    ucx_library = None
    try:
        ucx = measure_ucx(arguments.cpus, arguments.count)
    except UcxUnavailable as error:
        print(f"UCX is left out: {error}")
    else:
        ucx_library = ucx.library
        channels |= {"UCX, TCP": ucx.channel, "bare libucp, TCP": ucx.bare}
        print(ucx_library)
    for name, series in channels.items():
        for point in series:
            print(
                f"{name:>16} {format_bytes(point.size):>8}: "
                f"median {point.median:9.2f} us, p99 {point.p99:9.2f} us"
            )
    for point in attend:
        print(f"attend {point.size:>4} requests: median {point.median:8.2f} us, p99 {point.p99:9.2f} us")
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": platform.processor() or platform.machine(),
        "cpus": arguments.cpus,
        "ucx": ucx_library,
        "channels_us": {name: [asdict(point) for point in series] for name, series in channels.items()},
        "attend_us": [asdict(point) for point in attend],
    }
    (arguments.output / "transport.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(channels, attend, arguments.output / "transport.png")


if __name__ == "__main__":
    main()
