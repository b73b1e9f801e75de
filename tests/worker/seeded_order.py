"""Lanes on streams whose every next move a seed decides: of hosts, streams, the proxy and attention workers.

What moves is what runs on a GPU: `StreamedLayers`, the exchange's native code, native attention workers. The test has
the streams' operations, the proxy's rounds and both ends of the workers' channels in its hands, on one thread, so that
a seed gives the same order each time.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from cpu_stream import load
from held_streams import HeldStream, HeldStreams
from held_worker import HeldWorker
from worker_processes import DEADLINE

from vllm_lamina._native import AttentionClient, ChannelTimeout
from vllm_lamina.attention_backend.step import PlannedRequest, Step, StepPlan
from vllm_lamina.attention_backend.streamed_layers import StreamedLayers, memory_bytes
from vllm_lamina.device.base import Chunks
from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, LayerSpec
from vllm_lamina.kv_cache.partition import Partition, Pool, Share

PREFIX = 32
"""Tokens that requests may have in common; they have twice as many at most."""
NUM_BLOCKS = 200
PLAIN = Geometry.uniform(4, 32, 4, 2, 32, "float32", (0.2,) * 4)
"""Twice as many layers as a lane has places for frames."""
SINKS, SLOPES = (0.5, -1.0, 1.5, 0.0), (0.5, 0.25, 0.125, 0.0625)
LAYERED = Geometry(
    (CacheSpec(32, 2, 32, 32, "float32"), CacheSpec(16, 2, 48, 32, "float32")),
    (
        LayerSpec(0, 0, 0, 4, 0.2, sinks=SINKS),
        LayerSpec(1, 1, 0, 4, 0.2, window=20, sinks=SINKS),
        LayerSpec(0, 2, 0, 4, 0.2, chunk=32),
        LayerSpec(1, 1, 1, 8, 0.2, window=9, soft_cap=3.0),
        LayerSpec(0, 0, 0, 4, 0.3, stores=False),
        LayerSpec(1, 1, 0, 4, 0.2, window=20, stores=False, alibi_slopes=SLOPES),
    ),
)
"""Groups in which a chunk sees more or less of its context, layers of several shapes, and some that share KV."""
MAX_TOKENS = 128
NUM_STEPS = 8
TOLERANCE = 1e-4


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec, position: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the layer's rule; the first of k and v is at ``position``, and q follows ``context`` of them.

    The output, and the LSE [rows, heads].
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->qhk", q, k) * layer.scale
    if layer.soft_cap:
        scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
    keys, rows = position + torch.arange(len(k)), position + context + torch.arange(len(q))[:, None]
    if layer.alibi_slopes:
        scores += torch.tensor(layer.alibi_slopes)[:, None] * (keys - rows)[:, None]
    is_seen = keys <= rows
    if layer.window:
        is_seen &= keys > rows - layer.window
    if layer.chunk:
        is_seen &= keys >= rows // layer.chunk * layer.chunk
    scores = scores.masked_fill(~is_seen[:, None], -torch.inf)
    lse = scores.logsumexp(2)
    if layer.sinks:
        lse = torch.logaddexp(lse, torch.tensor(layer.sinks))
    return torch.einsum("qhk,khd->qhd", (scores - lse[..., None]).exp(), v), lse


def attend_locally(
    layer: LayerSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `LocalAttention`."""
    rows = zip(*(x.split(chunks.lengths) for x in (q, k, v)), chunks.positions.tolist(), strict=True)
    parts = [attention(*chunk, layer, position, 0) for *chunk, position in rows]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


@dataclass
class Request:
    blocks: list[list[int]]
    """By group of layers."""
    context: int = 0
    in_flight: bool = False


@dataclass
class StepInFlight:
    """A step that was announced, and what must come of it: of each layer q, k, v, output and expected output."""

    step: Step
    requests: list[Request]
    layers: list[tuple[Any, ...]]
    num_enqueued: int = 0
    is_finished: bool = False
    is_ended: bool = False


@dataclass
class Fault:
    """Something that is done wrong, for the order to find."""

    stream: Callable[[], HeldStream] = HeldStream
    spoil: Callable[[StreamedLayers], None] = lambda layers: None
    announces_late: bool = False


@dataclass
class SeededRun:
    """Steps of two lanes, in an order that the seed decides. A worker may be ``lost`` in the middle of it."""

    seed: int
    kind: str = "head"
    shares: tuple[int, ...] = (2,)
    """By head KV heads of each worker, otherwise blocks."""
    geometry: Geometry = PLAIN
    lost: bool = False
    fault: Fault = field(default_factory=Fault)
    order: list[str] = field(default_factory=list)
    """What happened."""
    num_lanes: int = 2
    _is_replaced: bool = False

    @contextlib.contextmanager
    def _open(self) -> Iterator[Self]:
        by_head = self.kind == "head"
        firsts = accumulate(self.shares, initial=0)
        caches = len(self.geometry.caches)
        geometries = [
            self.geometry.with_heads([first] * caches, [n] * caches) if by_head else self.geometry
            for first, n in zip(firsts, self.shares, strict=False)
        ]
        blocks = [NUM_BLOCKS if by_head else n for n in self.shares]
        shares = tuple(
            Share(Pool("", 0), geometry, geometry.block_bytes(), n)
            for geometry, n in zip(geometries, blocks, strict=True)
        )
        self._partition = Partition(self.kind, "", self.geometry, shares)
        self._random = random.Random(self.seed)
        self._numbers = torch.Generator().manual_seed(self.seed)
        self._workers = [self._start_worker(index) for index in range(len(shares))]
        channels = [worker.channel for worker in self._workers]
        self._client = AttentionClient(channels, self._partition.to_native())
        self._streams = HeldStreams(self.fault.stream)
        self._layers = StreamedLayers(
            self._client, self._streams, self._partition, self.num_lanes, MAX_TOKENS, None, 0.0
        )
        self._exchange = self._layers._exchange
        self._exchange.set_timeout(DEADLINE)  # a host's call of `wait` looks and returns, a worker has time
        self.fault.spoil(self._layers)
        self._lanes: list[StepInFlight | None] = [None] * self.num_lanes
        self._is_lost = False
        self._forget()
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of so few rows each has none
        try:
            yield self
        finally:
            torch.set_num_threads(num_threads)
            for worker in self._workers:
                worker.leave()

    def _start_worker(self, index: int) -> HeldWorker:
        share = self._partition.shares[index]
        ring = share.geometry.ring_bytes(MAX_TOKENS, MAX_TOKENS, 2 * PREFIX)
        return HeldWorker(share, ring + memory_bytes(share.geometry, self.num_lanes, MAX_TOKENS))

    def _forget(self) -> None:
        """No KV is there, and no request has come yet."""
        self._kv: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        """By group and position, k and v of all slots."""
        for layer in self.geometry.layers:
            cache = self.geometry.caches[layer.cache]
            shape = (NUM_BLOCKS * cache.block_size, cache.num_kv_heads)
            self._kv[layer.group, layer.position] = (
                torch.full((*shape, cache.head_size), torch.nan),
                torch.full((*shape, cache.head_size_v), torch.nan),
            )
        self._free_blocks = self._random.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self._requests: list[Request] = []
        self._prefixes: list[list[list[int]]] = []
        self._num_to_come = NUM_STEPS
        self._has_failed = False

    def run(self) -> None:
        """Until all steps are over. What goes wrong is an AssertionError, whose note has the order."""
        with self._open():
            moves: dict[str, Callable[[], bool]] = {"announce": self._announce, "proxy": self._serve}
            for lane in range(self.num_lanes):
                moves[f"host {lane}"] = lambda lane=lane: self._go_on(lane)  # type: ignore[misc]
                moves[f"stream {lane}"] = self._streams.streams[lane].advance
            for index in range(len(self._workers)):
                moves[f"worker {index} takes"] = lambda index=index: self._workers[index].take_frame()  # type: ignore[misc]
                moves[f"worker {index} answers"] = lambda index=index: self._workers[index].send_reply()  # type: ignore[misc]
            if self.lost:
                moves |= {"lose": self._lose, "replace": self._replace}
            try:
                self._move(moves)
            except AssertionError as error:
                error.add_note(f"seed {self.seed}: {', '.join(self.order)}")
                raise

    def _move(self, moves: dict[str, Callable[[], bool]]) -> None:
        # Some are much slower than others.
        haste = {name: self._random.choice([1, 4, 16]) for name in moves}
        waiting: set[str] = set()
        while self._num_to_come or any(self._lanes) or (self.lost and not self._is_replaced):
            names = [name for name in moves if name not in waiting]
            assert names, "nobody can go on"
            [name] = self._random.choices(names, [haste[name] for name in names])
            if moves[name]():
                self.order.append(name)
                waiting.clear()
            else:
                waiting.add(name)

    # ------------------------------------------------------------------------------------------------- what may happen

    def _announce(self) -> bool:
        """A lane's next step is scheduled."""
        idle = [lane for lane, step in enumerate(self._lanes) if step is None]
        if not idle or not self._num_to_come or self._has_failed:
            return False
        lane = self._random.choice(idle)
        self._num_to_come -= 1
        self._lanes[lane] = self._next_step()
        if not self.fault.announces_late:
            self._layers.announce(lane)
        return True

    def _go_on(self, lane: int) -> bool:
        """The lane's host, see `Lane` in worker/model_worker/lanes.py."""
        now, stream = self._lanes[lane], self._streams.streams[lane]
        if now is None:
            return False
        if now.num_enqueued < self.geometry.num_layers:
            # PyTorch's operators of a chunk run on the host, after all that was enqueued.
            if now.num_enqueued and now.step.has_chunks and not stream.is_done:
                return False
            if now.num_enqueued == 0:
                if self.fault.announces_late:
                    self._layers.announce(lane)
                self._layers.begin(lane)
                self._layers.prepare(lane, now.step)
            layer = now.num_enqueued
            q, k, v, out, _ = now.layers[layer]
            attends = partial(attend_locally, self.geometry.layers[layer])
            self._layers.attend(lane, now.step, layer, q, k, v, out, attends)
            now.num_enqueued += 1
        elif not now.is_finished:
            try:
                self._layers.wait(lane)
            except ChannelTimeout:
                return False
            now.is_finished = True
        elif self._layers._lanes[lane].failure is not None:
            if not stream.is_done:
                return False  # take_failure() waits for it
            assert self._layers.take_failure(lane)
            assert self._is_lost
            self._has_failed, self._lanes[lane] = True, None
        elif not now.is_ended:
            self._layers.end(lane)
            now.is_ended = True
        else:
            if not stream.is_done:
                return False  # what was sampled is there only then
            self._check(now)
            self._lanes[lane] = None
        return True

    def _serve(self) -> bool:
        words = [word for lane in range(self.num_lanes) for word in self._exchange.words(lane)[:4]]
        before = [load(word) for word in words]
        return self._exchange.serve_once() or [load(word) for word in words] != before

    def _lose(self) -> bool:
        if self._is_lost or self._is_replaced or not any(self._lanes) or self._num_to_come > NUM_STEPS // 2:
            return False
        self._lost_one = self._random.randrange(len(self._workers))
        self._workers[self._lost_one].leave()
        self._is_lost = True
        return True

    def _replace(self) -> bool:
        """A worker takes the place of the lost one, and all requests begin anew."""
        if not self._is_lost or any(self._lanes):
            return False
        self._workers[self._lost_one] = self._start_worker(self._lost_one)
        self._layers.replace_channel(self._lost_one, self._workers[self._lost_one].channel)
        self._client.generation += 1
        self._forget()
        self._is_lost, self._is_replaced = False, True
        return True

    # ----------------------------------------------------------------------------------------------------------- steps

    def _next_step(self) -> StepInFlight:
        """Prompts, requests that hit a prefix of earlier steps or of this one, and requests that go on."""
        parts: list[tuple[Request, int]] = []
        prompts_alone = self._random.random() < 0.3
        for _ in range(self._random.choice([1, 1, 2, 3])):
            kind = "prompt" if prompts_alone else self._random.choice(["prompt", "hit", "hit", "goes on"])
            idle = [
                request
                for request in self._requests
                if not request.in_flight and request.context < 2 * PREFIX
            ]
            if kind == "prompt" or not self._prefixes:
                self._prefixes.append(self._blocks())
                request, query = self._request(self._prefixes[-1]), self._random.choice([32, 40])
            elif kind == "hit" or not idle:
                request = self._request(self._random.choice(self._prefixes[-2:]), context=PREFIX)
                query = self._random.choice([1, 1, 1, 5])
            else:
                request, query = self._random.choice(idle), 1
            if request not in self._requests:
                self._requests.append(request)
            request.in_flight = True
            parts.append((request, query))
        parts.sort(key=lambda part: not (part[1] == 1 and part[0].context))  # decodes first
        planned = {
            f"{i}": PlannedRequest(
                request.context, query, tuple(np.array(blocks, np.int32) for blocks in request.blocks)
            )
            for i, (request, query) in enumerate(parts)
        }
        step = Step(StepPlan(planned, lambda: tuple(planned)), self.geometry)
        layers = [self._layer(layer, step, parts) for layer in self.geometry.layers]
        for request, query in parts:
            request.context += query
        return StepInFlight(step, [request for request, _ in parts], layers)

    def _blocks(self) -> list[list[int]]:
        """By group, for as many tokens as a prefix has."""
        return [
            [self._free_blocks.pop() for _ in range(PREFIX // group.block_size)]
            for group in self.geometry.groups
        ]

    def _request(self, prefix: list[list[int]], context: int = 0) -> Request:
        blocks = [first + rest for first, rest in zip(prefix, self._blocks(), strict=True)]
        return Request(blocks, context)

    def _layer(self, layer: LayerSpec, step: Step, parts: list[tuple[Request, int]]) -> tuple[Any, ...]:
        cache, size = self.geometry.caches[layer.cache], self.geometry.block_size(layer.group)
        q, k, v = (
            torch.randn(step.num_tokens, heads, head_size, generator=self._numbers)
            for heads, head_size in (
                (layer.num_heads, cache.head_size),
                (cache.num_kv_heads, cache.head_size),
                (cache.num_kv_heads, cache.head_size_v),
            )
        )
        kept = self._kv[layer.group, layer.position]
        if layer.stores:
            slots = torch.from_numpy(step.groups[layer.group].slot_mapping)
            kept[0][slots], kept[1][slots] = k, v
        expected = []
        for rows, (request, query) in zip(q.split([query for _, query in parts]), parts, strict=True):
            positions = torch.arange(request.context + query)
            blocks = torch.tensor(request.blocks[layer.group])
            slots = blocks[positions // size] * size + positions % size
            expected.append(attention(rows, kept[0][slots], kept[1][slots], layer, 0, request.context)[0])
        out = torch.full((step.num_tokens, layer.num_heads, cache.head_size_v), torch.nan)
        return q, *((k, v) if layer.stores else (None, None)), out, torch.cat(expected)

    def _check(self, now: StepInFlight) -> None:
        for layer, (_, _, _, out, expected) in enumerate(now.layers):
            torch.testing.assert_close(
                out,
                expected,
                rtol=TOLERANCE,
                atol=TOLERANCE,
                msg=lambda text, layer=layer: f"layer {layer}: {text}",  # type: ignore[misc]
            )
        for request in now.requests:
            request.in_flight = False
