"""A model worker's lane on a stream, played by the tests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
from cpu_stream import CpuStream
from engine import Engine, Request, to_dtype, to_float64
from numpy.typing import NDArray

from vllm_lamina._native import Partition, StreamedExchange
from vllm_lamina.kv_cache.geometry import Geometry


def array_at(address: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """The memory there."""
    count = int(np.prod(shape))
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype, count).reshape(shape)


class StreamedEngine(Engine):
    """One lane of a `StreamedExchange`: what the stream does is done with NumPy.

    A step is enqueued as a whole, and its outputs are checked when it is over.
    """

    def __init__(
        self,
        exchange: StreamedExchange,
        shares: list[Geometry],
        geometry: Geometry,
        num_blocks: int,
        stream: CpuStream,
        seed: int = 0,
        lane: int = 0,
    ) -> None:
        super().__init__(exchange, geometry, num_blocks, seed, lane)  # type: ignore[arg-type]
        self.exchange, self.stream = exchange, stream
        self.words = dict(
            zip(("packed", "taken", "free", "replied", "replies"), exchange.words(lane), strict=True)
        )
        # Where each worker's heads begin.
        kv = 0
        self.shares: list[tuple[Geometry, int, int]] = []
        for share in shares:
            group = geometry.layers[0].num_heads // geometry.caches[0].num_kv_heads
            self.shares.append((share, kv * group, kv))
            kv += (
                share.caches[0].num_kv_heads
                if share.caches[0].num_kv_heads < geometry.caches[0].num_kv_heads
                else 0
            )
        self.dtype = to_dtype(np.zeros(1, np.float32), geometry.caches[0].dtype).dtype
        self.checks: list[Callable[[], None]] = []

    def send(self, layer: int, rows: list[NDArray[np.generic]]) -> None:
        heads = [
            np.ascontiguousarray(part).reshape(len(part), -1, self.geometry.caches[0].head_size)
            for part in rows
        ]
        if layer == 0:
            self.parts = [self.exchange.part(self.lane, w, 0) for w in range(len(self.shares))]
        parts = self.parts

        def pack() -> None:
            for w, (share, q_head, kv_head) in enumerate(self.shares):
                q_tokens, kv_tokens, _ = parts[w]
                at = self.exchange.payload(self.lane, w, layer)
                chosen = [heads[0][q_tokens, q_head : q_head + share.layers[0].num_heads]] + [
                    rows[kv_tokens, kv_head : kv_head + share.caches[0].num_kv_heads] for rows in heads[1:]
                ]
                for rows in chosen:
                    if rows.size:
                        array_at(at, rows.shape, self.dtype)[:] = rows
                    at += -(-rows.nbytes // 64) * 64

        self.stream.wait(self.words["free"], layer + 1)
        self.stream.enqueue(pack)
        self.stream.write(self.words["packed"], layer + 1)

    def collect_and_check(self, layer: int) -> None:
        """Enqueue the layer's end; `finish` checks it."""
        state = dict(vars(self))
        parts = self.parts
        geometry = self.geometry
        num_tokens = self.num_tokens
        result = np.zeros(
            (num_tokens, geometry.layers[0].num_heads, geometry.caches[0].head_size), np.float64
        )
        lse = np.full((num_tokens, geometry.layers[0].num_heads), -np.inf)

        def take() -> None:
            for w, (share, first, _) in enumerate(self.shares):
                q_tokens, _, without_lse = parts[w]
                if not len(q_tokens):
                    continue
                address = ctypes.c_uint64.from_address(self.words["replies"] + 8 * w).value
                if address == 0:  # the step failed
                    return
                shape = (len(q_tokens), share.layers[0].num_heads, geometry.caches[0].head_size)
                out = to_float64(array_at(address, shape, self.dtype).copy())
                lse_at = address + -(-int(np.prod(shape)) * self.dtype.itemsize // 64) * 64
                part_lse = np.zeros(shape[:2])  # alone, any will do
                if without_lse < len(q_tokens):
                    rest = (len(q_tokens) - without_lse, share.layers[0].num_heads)
                    part_lse[without_lse:] = array_at(lse_at, rest, np.dtype(np.float32))
                heads = slice(first, first + share.layers[0].num_heads)
                before, merged = lse[q_tokens, heads], np.logaddexp(lse[q_tokens, heads], part_lse)
                weights = np.exp(before - merged)[..., None], np.exp(part_lse - merged)[..., None]
                result[q_tokens, heads] = result[q_tokens, heads] * weights[0] + out * weights[1]
                lse[q_tokens, heads] = merged

        if any(len(part[0]) for part in parts):
            self.stream.wait(self.words["replied"], layer + 1)
            self.stream.enqueue(take)
            self.stream.write(self.words["taken"], layer + 1)

        def check() -> None:
            vars(self).update({name: state[name] for name in ("q", "out", "requests", "num_decodes")})
            self.context_rows = state["context_rows"]
            rows = [
                token
                for request, first in zip(self.requests, _first_tokens(self), strict=True)
                for token in range(first, first + request.query)
                if request.context
            ][self.num_decodes :]
            self.taken = (
                to_dtype(result[rows].astype(np.float32), geometry.caches[0].dtype),
                lse[rows].astype(np.float32),
            )
            decodes = to_dtype(result[: self.num_decodes].astype(np.float32), geometry.caches[0].dtype)
            width = geometry.layers[0].num_heads * geometry.caches[0].head_size
            self.out.reshape(num_tokens, -1)[: self.num_decodes, :width] = decodes.reshape(-1, width)
            super(StreamedEngine, self).collect_and_check(layer)

        self.checks.append(check)

    def collect(self, layer: int) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
        return self.taken

    def step(
        self, num_decodes: int, requests: list[Request], padding: int = 0, skip: tuple[int, ...] = ()
    ) -> None:
        self.exchange.announce(self.lane)
        self.enqueue_step(num_decodes, requests, padding, skip)
        assert self.finish() is None

    def enqueue_step(
        self, num_decodes: int, requests: list[Request], padding: int = 0, skip: tuple[int, ...] = ()
    ) -> None:
        """Enqueue a step that was announced, and wait for nothing of it."""
        super().step(num_decodes, requests, padding, skip)

    def finish(self) -> str | None:
        """Wait until the step is over and check it. Why it failed, if it did."""
        failure = self.exchange.finish_step(self.lane)
        self.stream.synchronize()
        checks, self.checks = self.checks, []
        if failure is None:
            for check in checks:
                check()
        return failure


def _first_tokens(engine: Engine) -> list[int]:
    lens = [request.query for request in engine.requests]
    return [sum(lens[:i]) for i in range(len(lens))]


def partition_of(geometry: Geometry, kind: str, shares: list[int]) -> Partition:
    if kind == "heads":
        return Partition.by_heads(geometry.to_native(), [[share] for share in shares])
    return Partition.by_blocks(geometry.to_native(), shares)
