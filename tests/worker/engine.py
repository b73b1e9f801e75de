"""A model worker played by the tests: sends steps and keeps a float64 reference beside them."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vllm_lamina._native import AttentionClient, Partition
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


def to_dtype(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Round to the dtype; bfloat16 comes as its bits in uint16."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float64(values: NDArray[np.generic]) -> NDArray[np.float64]:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def softmax_attention(
    q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64], scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attend without a mask. q: [rows, heads, d]; k, v: [tokens, KV heads, d]. Returns out and LSE."""
    group = q.shape[1] // k.shape[1]
    scores = np.einsum("qhd,khd->qhk", q, np.repeat(k, group, axis=1)) * scale
    lse = np.logaddexp.reduce(scores, axis=-1)
    return np.einsum("qhk,khd->qhd", np.exp(scores - lse[..., None]), np.repeat(v, group, axis=1)), lse


def client_of_one(connection: AttentionWorkerConnection, geometry: Geometry) -> AttentionClient:
    """A client of one worker, which is configured and holds everything."""
    partition = Partition.by_heads(geometry.to_native(), [[geometry.caches[0].num_kv_heads]])
    return AttentionClient([connection.channel], partition)


@dataclass
class Request:
    """One request's part of a step; a decode has one query token and is listed before all prefill chunks."""

    context: int
    query: int
    blocks: list[int]


class Engine:
    """One lane of a client, with the KV cache in float64 that the worker should hold."""

    def __init__(
        self, client: AttentionClient, geometry: Geometry, num_blocks: int, seed: int = 0, lane: int = 0
    ):
        self.client, self.geometry, self.lane = client, geometry, lane
        shape = (
            geometry.num_layers,
            num_blocks * geometry.block_size(0),
            geometry.caches[0].num_kv_heads,
            geometry.caches[0].head_size,
        )
        self.k, self.v = np.zeros(shape), np.zeros(shape)
        self.rng = np.random.default_rng(seed)

    @classmethod
    def on(cls, connection: AttentionWorkerConnection, geometry: Geometry, num_blocks: int) -> Self:
        """The only lane of a client of one worker, which is configured."""
        return cls(client_of_one(connection, geometry), geometry, num_blocks)

    def slots(self, request: Request, begin: int, end: int) -> NDArray[np.int64]:
        size = self.geometry.block_size(0)
        return np.array([request.blocks[i // size] * size + i % size for i in range(begin, end)], np.int64)

    def random(self, num_tokens: int, num_heads: int, padding: int) -> NDArray[np.generic]:
        """Rows of a wider tensor, as q, k and v are slices of one projection's output."""
        values = self.rng.standard_normal(
            (num_tokens, num_heads, self.geometry.caches[0].head_size + padding)
        )
        rows = to_dtype(values.astype(np.float32), self.geometry.caches[0].dtype)
        return rows.reshape(num_tokens, -1)[:, : num_heads * self.geometry.caches[0].head_size]

    def heads(self, rows: NDArray[np.generic]) -> NDArray[np.float64]:
        return to_float64(np.ascontiguousarray(rows)).reshape(
            len(rows), -1, self.geometry.caches[0].head_size
        )

    def begin_step(self, num_decodes: int, requests: list[Request], skip: tuple[int, ...] = ()) -> None:
        """Describe a step; `skip` are tokens that are not stored."""
        self.num_decodes, self.requests = num_decodes, requests
        self.slot_mapping = np.concatenate([self.slots(r, r.context, r.context + r.query) for r in requests])
        self.slot_mapping[list(skip)] = -1
        table = np.full((len(requests), max(len(r.blocks) for r in requests) + 3), -7, np.int32)
        for row, request in zip(table, requests, strict=True):
            row[: len(request.blocks)] = request.blocks
        rows = self.client.begin_step(
            self.lane,
            num_decodes,
            np.array([r.query for r in requests], np.int32),
            np.array([r.context for r in requests], np.int32),
            table,
            self.slot_mapping,
        )
        context_rows = sum(r.query for r in requests[num_decodes:] if r.context)
        assert rows == (num_decodes + context_rows, context_rows)
        self.context_rows = context_rows

    def post(self, layer: int, padding: int = 0) -> None:
        geometry, num_tokens = self.geometry, len(self.slot_mapping)
        q = self.random(num_tokens, geometry.layers[0].num_heads, padding)
        k = self.random(num_tokens, geometry.caches[0].num_kv_heads, padding)
        v = self.random(num_tokens, geometry.caches[0].num_kv_heads, padding)
        self.out = np.zeros(
            (num_tokens, geometry.layers[0].num_heads, geometry.caches[0].head_size + padding), q.dtype
        )
        stored = self.slot_mapping >= 0
        self.k[layer, self.slot_mapping[stored]] = self.heads(k)[stored]
        self.v[layer, self.slot_mapping[stored]] = self.heads(v)[stored]
        self.q = self.heads(q)
        self.send(layer, q, k, v)

    def send(
        self, layer: int, q: NDArray[np.generic], k: NDArray[np.generic], v: NDArray[np.generic]
    ) -> None:
        """Post rows of q, k and v."""
        rows = [number for array in (q, k, v) for number in (array.ctypes.data, array.strides[0])]
        self.client.post(self.lane, layer, *rows)

    def collect(self, layer: int) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
        """Take the layer's output: of decodes into `out`; of prefill rows with context, and their LSE, returned."""
        geometry = self.geometry
        context_out = np.zeros(
            (self.context_rows, geometry.layers[0].num_heads, geometry.caches[0].head_size), self.out.dtype
        )
        context_lse = np.zeros((self.context_rows, geometry.layers[0].num_heads), np.float32)
        pointers = (context_out.ctypes.data, context_lse.ctypes.data) if self.context_rows else (0, 0)
        self.client.collect(
            self.lane, layer, self.out.ctypes.data, self.out.strides[0], *pointers, timeout=20.0
        )
        return context_out, context_lse

    def collect_and_check(self, layer: int) -> None:
        geometry = self.geometry
        context_out, context_lse = self.collect(layer)
        out = self.heads(
            self.out.reshape(len(self.out), -1)[
                :, : geometry.layers[0].num_heads * geometry.caches[0].head_size
            ]
        )
        tolerance = TOLERANCE[geometry.caches[0].dtype]
        token = row = 0
        for i, request in enumerate(self.requests):
            q = self.q[token : token + request.query]
            attended = request.context + 1 if i < self.num_decodes else request.context
            slots = self.slots(request, 0, attended)
            expected, lse = softmax_attention(
                q, self.k[layer, slots], self.v[layer, slots], geometry.layers[layer].scale
            )
            if i < self.num_decodes:
                np.testing.assert_allclose(out[token : token + 1], expected, atol=tolerance, rtol=tolerance)
            elif request.context:
                rows = slice(row, row + request.query)
                np.testing.assert_allclose(
                    to_float64(context_out[rows]), expected, atol=tolerance, rtol=tolerance
                )
                np.testing.assert_allclose(context_lse[rows], lse, atol=tolerance, rtol=tolerance)
                row += request.query
            token += request.query
        assert not out[self.num_decodes :].any(), "only decode rows are written to out"

    def step(
        self, num_decodes: int, requests: list[Request], padding: int = 0, skip: tuple[int, ...] = ()
    ) -> None:
        """Run all layers of a step and check every output."""
        self.begin_step(num_decodes, requests, skip)
        for layer in range(self.geometry.num_layers):
            self.post(layer, padding)
            self.collect_and_check(layer)
