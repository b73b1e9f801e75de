"""Captured steps: a graph attends each step that is prepared when it is replayed, like the layers that it captured."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cores import ATTENTION_CPU
from cpu_graph import CpuGraph, capture, captured
from cpu_stream import CpuStreams, LaneStream, launch_one_at_a_time
from kernel_modules import exchange_kernels
from worker_processes import DEADLINE, pause

from vllm_lamina._native import AttentionClient, Channel
from vllm_lamina.attention_backend.step import PlannedRequest, Step, StepPlan
from vllm_lamina.attention_backend.streamed_layers import StreamedLayers, memory_bytes
from vllm_lamina.device.base import LayerShape, LocalAttention
from vllm_lamina.device.cpu import CpuDevice
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import Geometry, LayerSpec
from vllm_lamina.kv_cache.partition import Partition, Pool, Share
from vllm_lamina.transport.connection import AttentionWorkerConnection

NUM_LAYERS, NUM_BLOCKS, MAX_TOKENS, CAPTURED = 3, 24, 32, 4
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 32
SHAPE = (32, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, "float32")
GEOMETRY = Geometry.uniform(NUM_LAYERS, *SHAPE, (0.2,) * NUM_LAYERS)
TWO_LAYERS = Geometry.uniform(2, *SHAPE, (0.2,) * 2)
SINKS = (0.5, -1.0, 1.5, 0.0)
LAYERED = Geometry(
    GEOMETRY.caches,
    (
        LayerSpec(0, 0, 0, NUM_HEADS, 0.2, sinks=SINKS),
        LayerSpec(0, 1, 0, NUM_HEADS, 0.2, window=20, sinks=SINKS),
        LayerSpec(0, 0, 0, NUM_HEADS, 0.2, sinks=SINKS[::-1], stores=False),
        LayerSpec(0, 1, 1, NUM_HEADS, 0.2, window=33),
    ),
)
WIDTH, KV_WIDTH = NUM_HEADS * HEAD_SIZE, NUM_KV_HEADS * HEAD_SIZE


class HostWaits(LaneStream):
    """There is no turn to hand over."""

    def fence(self) -> None:
        if captured() is None:
            self.synchronize()


class Streams(CpuStreams):
    def stream(self, lane: int) -> LaneStream:
        return HostWaits(lane)


class Model:
    """A lane's layers, each of which computes q, k and v from the output of the one before, in buffers that stay."""

    def __init__(self, layers: StreamedLayers, lane: int, geometry: Geometry) -> None:
        self.layers, self.lane, self.geometry = layers, lane, geometry
        self.attend_locally = [_local_attention(spec) for spec in geometry.layers]
        rng = torch.Generator().manual_seed(5)
        shape = (geometry.num_layers, WIDTH, WIDTH + 2 * KV_WIDTH)
        self.weights = torch.randn(*shape, generator=rng) / WIDTH**0.5
        self.input = torch.zeros(MAX_TOKENS, WIDTH)
        self.output = torch.zeros(MAX_TOKENS, WIDTH)

    def forward(self, num_tokens: int, step: Step | None) -> None:
        rows = self.input[:num_tokens]
        for layer, weight in enumerate(self.weights):
            q, k, v = (rows @ weight).split([WIDTH, KV_WIDTH, KV_WIDTH], dim=1)
            heads: list[Any] = [part.unflatten(1, (-1, HEAD_SIZE)) for part in (q, k, v)]
            if not self.geometry.layers[layer].stores:
                heads[1:] = None, None
            out = torch.empty(num_tokens, NUM_HEADS, HEAD_SIZE)
            if step is None:
                self.layers.capture(self.lane, layer, *heads, out)
            else:
                self.layers.attend(self.lane, step, layer, *heads, out, self.attend_locally[layer])
            rows = torch.tanh(out.flatten(1) + rows)
        self.output[:num_tokens] = rows

    def capture(self) -> CpuGraph:
        self.layers.enter(self.lane)
        for graph in (None, CpuGraph()):
            self.layers.prepare(self.lane, None)
            with capture(graph) if graph else contextlib.nullcontext():
                self.forward(CAPTURED, None)
        assert graph is not None
        return graph

    def begin(self, requests: Sequence[PlannedRequest]) -> Step:
        by_name = {str(i): request for i, request in enumerate(requests)}
        step = Step(StepPlan(by_name, lambda: list(by_name)), self.geometry)
        rng = torch.Generator().manual_seed(int(step.context_lens.sum()))
        self.input[: step.num_tokens] = torch.randn(step.num_tokens, WIDTH, generator=rng)
        self.layers.announce(self.lane)
        self.layers.begin(self.lane)
        self.layers.prepare(self.lane, step)
        return step

    def end(self, step: Step) -> torch.Tensor:
        self.layers.wait(self.lane)
        assert self.layers.take_failure(self.lane) is None
        self.layers.end(self.lane)
        self.layers.synchronize(self.lane)
        return self.output[: step.num_tokens].clone()

    def run(self, requests: Sequence[PlannedRequest], graph: CpuGraph | None = None) -> torch.Tensor:
        self.layers.enter(self.lane)
        step = self.begin(requests)
        if graph is None:
            self.forward(step.num_tokens, step)
        else:
            graph.replay()
        return self.end(step)


def _local_attention(spec: LayerSpec) -> LocalAttention:
    sinks = torch.tensor(spec.sinks) if spec.sinks else None
    sizes = (NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, HEAD_SIZE)
    shape = LayerShape(*sizes, spec.scale, torch.float32, window=spec.window, sinks=sinks)
    return CpuDevice().local_attention(shape)


@pytest.fixture(scope="module")
def workers() -> Iterator[list[EmbeddedAttentionWorker]]:
    launch_one_at_a_time()
    with contextlib.ExitStack() as stack:
        workers = [EmbeddedAttentionWorker.start(32 << 20, [int(ATTENTION_CPU)]) for _ in range(2)]
        for worker in workers:
            stack.callback(worker.stop)
        yield workers


@contextlib.contextmanager
def opened(
    workers: Sequence[EmbeddedAttentionWorker], kind: str, geometry: Geometry = GEOMETRY
) -> Iterator[list[Model]]:
    """Two lanes."""
    blocks = NUM_BLOCKS if kind == "head" else NUM_BLOCKS // len(workers)
    heads = NUM_KV_HEADS // len(workers)
    parts = [
        geometry.with_heads([i * heads], [heads]) if kind == "head" else geometry for i in range(len(workers))
    ]
    shares = tuple(Share(Pool("", 0), part, part.block_bytes(), blocks) for part in parts)
    partition = Partition(kind, "", geometry, shares)
    with contextlib.ExitStack() as stack:
        channels = [
            stack.enter_context(connected(worker, part, blocks))
            for worker, part in zip(workers, parts, strict=True)
        ]
        client = AttentionClient(channels, partition.to_native())
        streams = Streams(exchange_kernels(interpreted=True))
        layers = StreamedLayers(client, streams, partition, 2, MAX_TOKENS, spin_us=50, timeout=DEADLINE)
        yield [Model(layers, lane, geometry) for lane in range(2)]


@contextlib.contextmanager
def connected(worker: EmbeddedAttentionWorker, share: Geometry, num_blocks: int) -> Iterator[Channel]:
    ring = memory_bytes(share, 2, MAX_TOKENS) + share.ring_bytes(MAX_TOKENS, MAX_TOKENS, 256)
    with AttentionWorkerConnection.connect(worker.address) as connection:
        connection.configure(
            share, num_blocks, ring_bytes=ring, spin_us=50, worker_spin_us=50, heartbeat_timeout=DEADLINE
        )
        yield connection.channel


def request(context: int, query: int, *blocks: int) -> PlannedRequest:
    """Of layers of two groups as well: the second one's blocks are next to these."""
    return PlannedRequest(context, query, tuple(np.array(blocks, np.int32) + 2 * group for group in (0, 1)))


@pytest.mark.parametrize(
    ("kind", "num_workers", "geometry"),
    [
        ("head", 1, GEOMETRY),
        ("sequence", 2, LAYERED),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("sequence", 2, GEOMETRY),
                ("head", 2, GEOMETRY),
                ("head", 1, LAYERED),
                ("head", 2, LAYERED),
            )
        ),
    ],
)
def test_a_graph_attends_what_is_prepared(
    workers: list[EmbeddedAttentionWorker], kind: str, num_workers: int, geometry: Geometry
) -> None:
    """Steps of other sizes, requests and frames than when it was captured; in each lane, with an eager step between."""
    with opened(workers[:num_workers], kind, geometry) as models:
        graphs = [model.capture() for model in models]
        outputs: list[list[torch.Tensor]] = []
        for place, (model, graph) in enumerate([(models[0], None), *zip(models, graphs, strict=True)]):
            # Blocks below 12 are on the first worker where they divide them: one request gets to both.
            low, high = 4 * place, 12 + 4 * place
            blocks = [(low, high), (low + 1,), (high + 1,)]
            lengths = [31, 2, 1]
            outputs.append([model.run([request(0, lengths[i], *blocks[i])]) for i in range(3)])
            for count in (2, 3, 1, 3):
                decoded = range(len(lengths))[-count:]
                step = [request(lengths[i], 1, *blocks[i]) for i in decoded]
                outputs[-1].append(model.run(step, graph))
                for i in decoded:
                    lengths[i] += 1
        for place in (1, 2):
            for eager, replayed in zip(outputs[0], outputs[place], strict=True):
                torch.testing.assert_close(replayed, eager)
                assert eager.abs().max() > 0.1


def test_a_graph_without_a_step_runs_to_its_end(workers: list[EmbeddedAttentionWorker]) -> None:
    """As vLLM replays one when it has nothing to run."""
    with opened(workers[:1], "head") as [model, _]:
        graph = model.capture()
        eager = [model.run([request(0, 5, 1)]), model.run([request(5, 1, 1)])]
        model.layers.prepare(0, None)
        graph.replay()
        model.layers.synchronize(0)
        replayed = [model.run([request(0, 5, 2)]), model.run([request(5, 1, 2)], graph)]
        torch.testing.assert_close(replayed, eager)


def test_a_lane_has_its_own_graph(workers: list[EmbeddedAttentionWorker]) -> None:
    with opened(workers[:1], "head") as [first, second]:
        graph = first.capture()
        step = second.begin([request(0, 5, 1)])
        second.layers.enter(1)
        with pytest.raises(AssertionError, match="replays another lane's graph"):
            graph.replay()
        second.forward(step.num_tokens, step)
        second.end(step)


def test_a_frame_that_nobody_answers_stays_until_it_is_read(workers: list[EmbeddedAttentionWorker]) -> None:
    """The step after a prompt's first chunk is quick; the attention worker is not."""
    with opened(workers[:1], "head", TWO_LAYERS) as [model, _]:
        graph = model.capture()
        prompt, decode = [request(0, 16, 1)], [request(16, 1, 1)]
        model.run(prompt)
        expected = model.run(decode)
        packed = ctypes.c_int32.from_address(model.layers._lanes[0]._packed)

        def go_on() -> None:
            end = time.monotonic() + 0.3
            while packed.value == 0 and time.monotonic() < end:
                time.sleep(0.001)
            os.kill(workers[0].pid, signal.SIGCONT)

        for replayed in (None, graph):
            pause(workers[0].pid)
            model.run(prompt)
            packed.value = 0
            later = threading.Thread(target=go_on)
            later.start()
            torch.testing.assert_close(model.run(decode, replayed), expected)
            later.join()


def test_a_lost_worker_ends_a_replay_and_the_next_serves_it(workers: list[EmbeddedAttentionWorker]) -> None:
    doomed = EmbeddedAttentionWorker.start(32 << 20, [int(ATTENTION_CPU)])
    with contextlib.ExitStack() as stack:
        stack.callback(doomed.stop)
        [model, _] = stack.enter_context(opened([doomed], "head"))
        graph = model.capture()
        model.run([request(0, 5, 1)])
        expected = model.run([request(5, 1, 1)], graph)
        pause(doomed.pid)
        model.begin([request(6, 1, 1)])
        killed = threading.Timer(0.2, os.kill, (doomed.pid, signal.SIGKILL))
        killed.start()
        graph.replay()
        model.layers.wait(0)
        assert model.layers.take_failure(0) is not None
        # The frames are in other memory from now on.
        channel = stack.enter_context(connected(workers[0], GEOMETRY, NUM_BLOCKS))
        model.layers.replace_channel(0, channel)
        model.run([request(0, 5, 1)])
        torch.testing.assert_close(model.run([request(5, 1, 1)], graph), expected)
