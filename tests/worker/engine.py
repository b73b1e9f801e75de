"""A model worker played by the tests: sends steps and keeps a float64 reference beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vllm_lamina._native import AttentionClient, Partition
from vllm_lamina.kv_cache.geometry import Geometry, LayerSpec
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
    q: NDArray[np.float64],
    k: NDArray[np.float64],
    v: NDArray[np.float64],
    layer: LayerSpec,
    first_position: int,
    with_sinks: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attend by the layer's rule, rows of q from ``first_position`` on, over keys from position 0 on.

    q: [rows, heads, d]; k, v: [tokens, KV heads, d]. Returns out and LSE; rows that see nothing have 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    scores = np.einsum("qhd,khd->qhk", q, np.repeat(k, group, axis=1)) * layer.scale
    if layer.soft_cap:
        scores = layer.soft_cap * np.tanh(scores / layer.soft_cap)
    rows = first_position + np.arange(len(q))[:, None]
    keys = np.arange(len(k))[None]
    if layer.alibi_slopes:
        scores += np.array(layer.alibi_slopes, np.float32)[None, :, None] * (keys - rows)[:, None]
    seen = keys <= rows
    if layer.window:
        seen &= keys > rows - layer.window
    if layer.chunk:
        seen &= keys >= rows // layer.chunk * layer.chunk
    scores = np.where(seen[:, None], scores, -np.inf)
    lse = np.logaddexp.reduce(scores, axis=-1)
    if layer.sinks and with_sinks:
        lse = np.logaddexp(lse, np.array(layer.sinks, np.float32))
    weights = np.exp(scores - np.where(np.isneginf(lse), 0.0, lse)[..., None])
    return np.einsum("qhk,khd->qhd", weights, np.repeat(v, group, axis=1)), lse


def client_of_one(connection: AttentionWorkerConnection, geometry: Geometry) -> AttentionClient:
    """A client of one worker, which is configured and holds everything."""
    partition = Partition.by_heads(geometry.to_native(), [list(geometry.divisible_heads)])
    return AttentionClient([connection.channel], partition)


@dataclass
class Request:
    """One request's part of a step; a decode has one query token and is listed before all prefill chunks.

    ``others`` are its blocks in the groups of layers after the first.
    """

    context: int
    query: int
    blocks: list[int]
    others: Sequence[list[int]] = ()

    @property
    def tables(self) -> list[list[int]]:
        return [self.blocks, *self.others]


class Engine:
    """One lane of a client, with the KV cache in float64 that the worker should hold.

    ``k`` and ``v`` are by layer, [slots, KV heads, head size]; layers that share theirs have the same array.
    """

    def __init__(
        self, client: AttentionClient, geometry: Geometry, num_blocks: int, seed: int = 0, lane: int = 0
    ):
        self.client, self.geometry, self.lane = client, geometry, lane
        places: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        for layer in geometry.layers:
            cache = geometry.caches[layer.cache]
            shape = (num_blocks * cache.block_size, cache.num_kv_heads)
            if layer.stores:
                k = np.zeros((*shape, cache.head_size))
                v = k[..., : cache.head_size_v] if cache.latent else np.zeros((*shape, cache.head_size_v))
                places[layer.group, layer.position] = k, v
        self.k = [places[layer.group, layer.position][0] for layer in geometry.layers]
        self.v = [places[layer.group, layer.position][1] for layer in geometry.layers]
        self.rng = np.random.default_rng(seed)

    @classmethod
    def on(cls, connection: AttentionWorkerConnection, geometry: Geometry, num_blocks: int) -> Self:
        """The only lane of a client of one worker, which is configured."""
        return cls(client_of_one(connection, geometry), geometry, num_blocks)

    def slots(self, request: Request, begin: int, end: int, group: int = 0) -> NDArray[np.int64]:
        size, blocks = self.geometry.block_size(group), request.tables[group]
        return np.array([blocks[i // size] * size + i % size for i in range(begin, end)], np.int64)

    def random(self, num_tokens: int, num_heads: int, head_size: int, padding: int) -> NDArray[np.generic]:
        """Rows of a wider tensor, as q, k and v are slices of one projection's output."""
        values = self.rng.standard_normal((num_tokens, num_heads, head_size + padding))
        rows = to_dtype(values.astype(np.float32), self.geometry.caches[0].dtype)
        return rows.reshape(num_tokens, -1)[:, : num_heads * head_size]

    @staticmethod
    def heads(rows: NDArray[np.generic], head_size: int) -> NDArray[np.float64]:
        return to_float64(np.ascontiguousarray(rows)).reshape(len(rows), -1, head_size)

    def begin_step(self, num_decodes: int, requests: list[Request], skip: tuple[int, ...] = ()) -> None:
        """Describe a step; `skip` are tokens that are not stored."""
        self.num_decodes, self.requests = num_decodes, requests
        self.num_tokens = sum(request.query for request in requests)
        groups = []
        for number in range(self.geometry.num_groups):
            slots = np.concatenate([self.slots(r, r.context, r.context + r.query, number) for r in requests])
            slots[list(skip)] = -1
            tables = [request.tables[number] for request in requests]
            table = np.full((len(requests), max(len(blocks) for blocks in tables) + 3), -7, np.int32)
            for row, blocks in zip(table, tables, strict=True):
                row[: len(blocks)] = blocks
            groups.append((table, slots))
        self.slot_mappings = [slots for _, slots in groups]
        rows = self.client.begin_step(
            self.lane,
            num_decodes,
            np.array([r.query for r in requests], np.int32),
            np.array([r.context for r in requests], np.int32),
            groups,
        )
        # By group, rows of each chunk that see context.
        self.context_rows = [
            [group.context_rows(r.context, r.query) for r in requests[num_decodes:]]
            for group in self.geometry.groups
        ]
        assert rows == [(num_decodes + sum(counts), sum(counts)) for counts in self.context_rows]

    def post(self, layer: int, padding: int = 0) -> None:
        spec = self.geometry.layers[layer]
        cache = self.geometry.caches[spec.cache]
        q = self.random(self.num_tokens, spec.num_heads, cache.head_size, padding)
        self.out = np.zeros((self.num_tokens, spec.num_heads, cache.head_size_v + padding), q.dtype)
        self.q = self.heads(q, cache.head_size)
        rows = [q]
        if spec.stores:
            k = self.random(self.num_tokens, cache.num_kv_heads, cache.head_size, padding)
            slots = self.slot_mappings[spec.group]
            stored = slots >= 0
            self.k[layer][slots[stored]] = self.heads(k, cache.head_size)[stored]
            rows.append(k)
            if not cache.latent:
                v = self.random(self.num_tokens, cache.num_kv_heads, cache.head_size_v, padding)
                self.v[layer][slots[stored]] = self.heads(v, cache.head_size_v)[stored]
                rows.append(v)
        self.send(layer, rows)

    def send(self, layer: int, rows: list[NDArray[np.generic]]) -> None:
        """Post rows of q, k and v, or the first of these."""
        numbers = [number for array in rows for number in (array.ctypes.data, array.strides[0])]
        self.client.post(self.lane, layer, *numbers, *[0] * (6 - len(numbers)))

    def collect(self, layer: int) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
        """Take the layer's output: of decodes into `out`; of prefill rows with context, and their LSE, returned."""
        spec = self.geometry.layers[layer]
        count, size_v = sum(self.context_rows[spec.group]), self.geometry.caches[spec.cache].head_size_v
        context_out = np.zeros((count, spec.num_heads, size_v), self.out.dtype)
        context_lse = np.zeros((count, spec.num_heads), np.float32)
        pointers = (context_out.ctypes.data, context_lse.ctypes.data) if count else (0, 0)
        self.client.collect(
            self.lane, layer, self.out.ctypes.data, self.out.strides[0], *pointers, timeout=20.0
        )
        return context_out, context_lse

    def collect_and_check(self, layer: int) -> None:
        spec = self.geometry.layers[layer]
        cache = self.geometry.caches[spec.cache]
        context_out, context_lse = self.collect(layer)
        out = self.heads(
            self.out.reshape(len(self.out), -1)[:, : spec.num_heads * cache.head_size_v], cache.head_size_v
        )
        tolerance = TOLERANCE[cache.dtype]
        token = row = 0
        for i, request in enumerate(self.requests):
            decodes = i < self.num_decodes
            count = 1 if decodes else self.context_rows[spec.group][i - self.num_decodes]
            slots = self.slots(request, 0, request.context + int(decodes), spec.group)
            expected, lse = softmax_attention(
                self.q[token : token + count],
                self.k[layer][slots],
                self.v[layer][slots],
                spec,
                request.context,
                with_sinks=decodes,
            )
            if decodes:
                np.testing.assert_allclose(out[token : token + 1], expected, atol=tolerance, rtol=tolerance)
            elif count:
                rows = slice(row, row + count)
                np.testing.assert_allclose(
                    to_float64(context_out[rows]), expected, atol=tolerance, rtol=tolerance
                )
                np.testing.assert_allclose(context_lse[rows], lse, atol=tolerance, rtol=tolerance)
                row += count
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
