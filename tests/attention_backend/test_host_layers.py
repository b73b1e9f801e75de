"""Layers of several kinds in one model: what both sides attend, merged, is attention over all that a token sees."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from attention_cases import reference

from vllm_lamina._native import AttentionClient, Partition
from vllm_lamina.attention_backend.host_layers import HostLayers
from vllm_lamina.attention_backend.step import PlannedRequest, Step, StepPlan
from vllm_lamina.device.base import LayerShape
from vllm_lamina.device.cpu import CpuDevice
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, LayerSpec
from vllm_lamina.transport.connection import AttentionWorkerConnection

TIMEOUT = 60.0
NUM_BLOCKS = 90
SINKS = (0.5, -1.0, 1.5, 0.0)
SLOPES = (0.5, 0.25, 0.125, 0.0625)
GEOMETRY = Geometry(
    (CacheSpec(32, 2, 32, 32, "float32"), CacheSpec(16, 1, 48, 32, "float32")),
    (
        LayerSpec(0, 0, 0, 4, 0.2, sinks=SINKS, soft_cap=3.0),
        LayerSpec(1, 1, 0, 4, 0.2, window=20, sinks=SINKS),
        LayerSpec(0, 2, 0, 4, 0.2, chunk=24),
        LayerSpec(1, 1, 1, 2, 0.2, window=9),
        LayerSpec(1, 1, 0, 4, 0.3, window=20, stores=False),
        LayerSpec(0, 0, 1, 4, 0.2, alibi_slopes=SLOPES),
    ),
)


def shape_of(spec: LayerSpec) -> LayerShape:
    cache = GEOMETRY.caches[spec.cache]
    return LayerShape(
        spec.num_heads,
        cache.num_kv_heads,
        cache.head_size,
        cache.head_size_v,
        spec.scale,
        torch.float32,
        window=spec.window,
        chunk=spec.chunk,
        soft_cap=spec.soft_cap,
        sinks=torch.tensor(spec.sinks) if spec.sinks else None,
        alibi_slopes=torch.tensor(spec.alibi_slopes) if spec.alibi_slopes else None,
    )


@pytest.mark.parametrize("num_workers", [1, 2])
def test_both_sides_together_attend_all(num_workers: int) -> None:
    cpu = [max(os.sched_getaffinity(0))]
    workers = [EmbeddedAttentionWorker.start(64 << 20, cpu) for _ in range(num_workers)]
    connections = [AttentionWorkerConnection.connect(worker.address) for worker in workers]
    try:
        blocks = [NUM_BLOCKS // num_workers] * num_workers
        for connection, count in zip(connections, blocks, strict=True):
            connection.configure(
                GEOMETRY, count, ring_bytes=4 << 20, spin_us=0, worker_spin_us=0, heartbeat_timeout=TIMEOUT
            )
        client = AttentionClient(
            [connection.channel for connection in connections],
            Partition.by_blocks(GEOMETRY.to_native(), blocks),
        )
        _run_steps(HostLayers(client, TIMEOUT, ranks_wait=False))
    finally:
        for connection in connections:
            connection.close()
        for worker in workers:
            worker.stop()


def _run_steps(layers: HostLayers) -> None:
    rng = np.random.default_rng(0)
    ids = rng.permutation(NUM_BLOCKS)
    # Of each of three requests, in each group.
    tables = [
        tuple(ids[30 * i + 10 * g : 30 * i + 10 * (g + 1)].astype(np.int32) for g in range(3))
        for i in range(3)
    ]
    attend_locally = [CpuDevice().local_attention(shape_of(spec)) for spec in GEOMETRY.layers]
    torch.manual_seed(0)
    # By layer and request, all tokens so far.
    history = [
        [
            (
                torch.empty(0, cache.num_kv_heads, cache.head_size),
                torch.empty(0, cache.num_kv_heads, cache.head_size_v),
            )
        ]
        * 3
        for cache in (GEOMETRY.caches[spec.cache] for spec in GEOMETRY.layers)
    ]
    lengths = [0, 0, 0]
    for queries in ([30, 0, 5], [1, 40, 0], [1, 33, 1], [1, 1, 1], [1, 1, 64], [1, 0, 1]):
        requests = [i for i in range(3) if queries[i]]
        # Decodes come first.
        requests.sort(key=lambda i: not (queries[i] == 1 and lengths[i]))
        parts = {f"{i}": PlannedRequest(lengths[i], queries[i], tables[i]) for i in requests}
        step = Step(StepPlan(parts, lambda names=tuple(parts): names), GEOMETRY)  # type: ignore[misc]
        sizes = [queries[i] for i in requests]
        targets: dict[tuple[int, int], int] = {}
        for number, spec in enumerate(GEOMETRY.layers):
            cache = GEOMETRY.caches[spec.cache]
            q = torch.randn(step.num_tokens, spec.num_heads, cache.head_size)
            out = torch.full((step.num_tokens, spec.num_heads, cache.head_size_v), torch.nan)
            if spec.stores:
                targets[spec.group, spec.position] = number
                k = torch.randn(step.num_tokens, cache.num_kv_heads, cache.head_size)
                v = torch.randn(step.num_tokens, cache.num_kv_heads, cache.head_size_v)
                for i, new_k, new_v in zip(requests, k.split(sizes), v.split(sizes), strict=True):
                    old_k, old_v = history[number][i]
                    history[number][i] = torch.cat((old_k, new_k)), torch.cat((old_v, new_v))
                layers.attend(0, step, number, q, k, v, out, attend_locally[number])
                k.fill_(torch.nan)  # as where its memory is used again
            else:
                layers.attend(0, step, number, q, None, None, out, attend_locally[number])
            held = history[targets[spec.group, spec.position]]
            expected = [
                reference(rows, *held[i], shape_of(spec), len(held[i][0]) - len(rows))[0]
                for i, rows in zip(requests, q.split(sizes), strict=True)
            ]
            torch.testing.assert_close(out.double(), torch.cat(expected), atol=2e-5, rtol=2e-5)
        for i in requests:
            lengths[i] += queries[i]
