"""Parts of `benchmarks.gpu` in one process without vLLM: words between a stream and the host, what a layer costs."""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_setup
from benchmarks.gpu_setup import Row
from vllm_lamina._native import AttentionClient
from vllm_lamina.attention_backend.step import PlannedRequest, Step, StepPlan
from vllm_lamina.attention_backend.streamed_layers import StreamedLayers, memory_bytes
from vllm_lamina.device.base import Streams
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.kv_cache.partition import Partition, Pool, Share
from vllm_lamina.transport.connection import AttentionWorkerConnection

TIMEOUT = 20.0
BLOCK_SIZE = 128


def words(report: Callable[[Row], None]) -> None:
    """Round trips between a stream and a thread of the host."""
    memory = np.zeros(4096, np.uint8)
    there, back = memory.ctypes.data, memory.ctypes.data + 128
    streams = list(gpu_setup.word_streams((memory.ctypes.data, memory.nbytes)))
    # The question that may break the process comes last.
    for captured in (False, True):
        for name, stream in streams:
            row = {"by": name, "captured": captured}
            if stream is None:
                report(row | {"error": "no cuda-bindings"})
            else:
                report(
                    row | {"us": round_trip_us(stream, there, back, captured, gpu_setup.SIZES.round_trips)}
                )


def round_trip_us(stream: Any, there: int, back: int, captured: bool, times: int) -> float:
    """Microseconds from a word that the stream writes to one that it waits for, and the host writes."""

    def enqueue() -> None:
        for number in range(1, times + 1):
            stream.write(there, number)
            stream.wait(back, number)

    launch = _captured(enqueue) if captured else enqueue
    seen, answer = (ctypes.c_int32.from_address(word) for word in (there, back))
    seen.value = answer.value = 0

    def host() -> None:
        for number in range(1, times + 1):
            while seen.value < number:
                pass
            answer.value = number

    thread = threading.Thread(target=host)
    thread.start()
    begin = time.perf_counter()
    launch()
    stream.synchronize()
    elapsed = time.perf_counter() - begin
    thread.join()
    return round(elapsed / times * 1e6, 2)


def _captured(enqueue: Callable[[], None]) -> Callable[[], None]:
    """What replays it, as a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    replay: Callable[[], None] = graph.replay
    return replay


class DecodeSteps:
    """Steps of lanes in which nothing but attention is computed, each request with ``context`` tokens."""

    def __init__(
        self,
        streams: Streams,
        widths: tuple[int, int, int],
        num_layers: int,
        batch: int,
        num_lanes: int,
        captured: bool = False,
    ) -> None:
        self.batch, self.num_lanes, self.num_layers, self.captured = batch, num_lanes, num_layers, captured
        dtype = "float32" if streams.tensor((1,), torch.float32)[0].device.type == "cpu" else "bfloat16"
        scales = (widths[2] ** -0.5,) * num_layers
        self.geometry = Geometry.uniform(num_layers, BLOCK_SIZE, *widths, dtype, scales)  # type: ignore[arg-type]
        self.streams = streams

    def run(self, num_steps: int, context: int, cpus: list[int]) -> tuple[float, float]:
        """Microseconds of a layer, and of these in the attention worker: medians over steps of all lanes."""
        blocks = -(-(context + num_steps) // BLOCK_SIZE) * self.batch * self.num_lanes
        pool_bytes = self.geometry.block_bytes() * (blocks + 1) + (64 << 20)
        worker = EmbeddedAttentionWorker.start(pool_bytes, cpus)
        try:
            with AttentionWorkerConnection.connect(worker.address) as connection:
                return self._run(connection, num_steps, context, blocks)
        finally:
            worker.stop()

    def _run(
        self, connection: AttentionWorkerConnection, num_steps: int, context: int, blocks: int
    ) -> tuple[float, float]:
        ring = self.geometry.ring_bytes(self.batch, self.batch, context + num_steps + 1)
        ring += memory_bytes(self.geometry, self.num_lanes, self.batch)
        connection.configure(self.geometry, blocks, ring_bytes=ring, spin_us=2000, worker_spin_us=2000)
        share = Share(Pool("", 0), self.geometry, self.geometry.block_bytes(), blocks)
        partition = Partition("head", "one worker", self.geometry, (share,))
        client = AttentionClient([connection.channel], partition.to_native())
        layers = StreamedLayers(
            client, self.streams, partition, self.num_lanes, self.batch, spin_us=2000, timeout=TIMEOUT
        )
        took: list[float] = []
        attention: list[float] = []
        lanes = [
            threading.Thread(
                target=self._lane,
                args=(layers, client, lane, self._model(layers, lane), num_steps, context, took, attention),
            )
            for lane in range(self.num_lanes)
        ]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
        if len(took) < num_steps * self.num_lanes:
            raise RuntimeError("a lane ended before its last step")
        return statistics.median(took), statistics.median(attention)

    def _model(self, layers: StreamedLayers, lane: int) -> Callable[[Step], None]:
        """What enqueues a step's layers, in buffers that stay."""
        cache = self.geometry.caches[0]
        heads, kv_heads, size = self.geometry.layers[0].num_heads, cache.num_kv_heads, cache.head_size
        dtype = getattr(torch, cache.dtype)
        q, _ = self.streams.tensor((self.batch, heads, size), dtype)
        kv, _ = self.streams.tensor((self.batch, kv_heads, size), dtype)
        out, _ = self.streams.tensor((self.batch, heads, size), dtype)

        def capture() -> None:
            for layer in range(self.num_layers):
                layers.capture(lane, layer, q, kv, kv, out)

        def attend(step: Step) -> None:
            for layer in range(self.num_layers):
                layers.attend(lane, step, layer, q, kv, kv, out, _no_chunks)

        if not self.captured:
            return attend
        # Here, not on the lanes' threads: nothing else may go to the device meanwhile.
        replay = _captured(capture)
        return lambda step: replay()

    def _lane(
        self,
        layers: StreamedLayers,
        client: AttentionClient,
        lane: int,
        model: Callable[[Step], None],
        num_steps: int,
        context: int,
        took: list[float],
        attention: list[float],
    ) -> None:
        layers.enter(lane)
        each = -(-(context + num_steps) // BLOCK_SIZE)
        first = lane * self.batch * each
        for number in range(num_steps):
            requests = {
                f"{i}": PlannedRequest(
                    context + number,
                    1,
                    (np.arange(first + i * each, first + (i + 1) * each, dtype=np.int32),),
                )
                for i in range(self.batch)
            }
            step = Step(StepPlan(requests, lambda names=tuple(requests): names), self.geometry)
            begin = time.perf_counter()
            layers.announce(lane)
            layers.begin(lane)
            layers.prepare(lane, step)
            model(step)
            layers.wait(lane)
            layers.end(lane)
            layers.synchronize(lane)
            took.append((time.perf_counter() - begin) / self.num_layers * 1e6)
            attention.append(client.step_times(lane)[1] / self.num_layers * 1e6)
            if (failure := layers.take_failure(lane)) is not None:
                raise RuntimeError(failure)


def _no_chunks(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("decodes alone have no prefill chunk")


def exchange(report: Callable[[Row], None]) -> None:
    """At the widths of an 8B model."""
    cpus = sorted(os.sched_getaffinity(0))
    cpus = cpus[2:] or cpus[-1:]
    sizes = gpu_setup.SIZES
    for captured in (False, True):
        for batch in sizes.batches:
            for num_lanes in (1, 2):
                streams = gpu_setup.make_streams()
                steps = DecodeSteps(streams, sizes.widths, sizes.layers, batch, num_lanes, captured)
                took, attention = steps.run(sizes.exchanged_steps, 100, cpus)
                case = {"batch": batch, "lanes": num_lanes, "captured": captured}
                report(case | {"layer us": took, "of these attention": attention})
