"""Models whose layers differ: groups that overlay one pool, score rules, shared KV, over workers by every partition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
from engine import Engine, Request
from random_steps import Workload, ranges
from worker_processes import DEADLINE

from vllm_lamina._native import AttentionClient, Partition
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, LayerSpec
from vllm_lamina.transport.connection import AttentionWorkerConnection

NUM_BLOCKS = 150
SINKS = tuple(np.linspace(-1.0, 2.0, 6).tolist())
SLOPES = (0.5, 0.25, 0.125, 0.0625)


def kv(
    block_size: int = 32,
    num_kv_heads: int = 2,
    head_size: int = 32,
    head_size_v: int = 32,
    dtype: str = "float32",
) -> CacheSpec:
    return CacheSpec(block_size, num_kv_heads, head_size, head_size_v, dtype)  # type: ignore[arg-type]


GEOMETRIES = {
    # As gpt-oss: every second layer has a window, all have sinks.
    "window and sinks": Geometry(
        (kv(num_kv_heads=3),),
        (
            LayerSpec(0, 0, 0, 6, 0.2, window=40, sinks=SINKS),
            LayerSpec(0, 1, 0, 6, 0.2, sinks=SINKS),
            LayerSpec(0, 0, 1, 6, 0.3, window=40, sinks=SINKS[::-1]),
            LayerSpec(0, 1, 1, 6, 0.1, sinks=SINKS),
        ),
    ),
    # As Gemma 2 and 3n: soft-caps, and layers that share the KV of others.
    "soft-cap and sharing": Geometry(
        (kv(dtype="bfloat16"),),
        (
            LayerSpec(0, 0, 0, 4, 0.3, window=33, soft_cap=2.0),
            LayerSpec(0, 1, 0, 4, 0.3, soft_cap=1.0),
            LayerSpec(0, 0, 0, 4, 0.2, window=33, stores=False),
            LayerSpec(0, 1, 0, 4, 0.25, stores=False),
        ),
    ),
    # As Llama 4: attention within chunks.
    "chunks": Geometry(
        (kv(block_size=16),), (LayerSpec(0, 0, 0, 4, 0.2, chunk=48), LayerSpec(0, 1, 0, 4, 0.2))
    ),
    # One group whose layers differ, so that nothing may be left out.
    "one group": Geometry(
        (kv(),),
        (
            LayerSpec(0, 0, 0, 4, 0.2, window=20, alibi_slopes=SLOPES),
            LayerSpec(0, 0, 1, 4, 0.2, chunk=64),
            LayerSpec(0, 0, 2, 4, 0.2),
        ),
    ),
    # Shapes, block sizes and pages that differ; the smaller page lies in a larger one.
    "shapes": Geometry(
        (kv(32, 2, 48, 32, "float16"), kv(16, 3, 32, 64, "float16"), kv(64, 2, 64, 64, "float16")),
        (
            LayerSpec(0, 0, 0, 4, 0.2),
            LayerSpec(1, 1, 0, 3, 0.2, window=50),
            LayerSpec(2, 2, 0, 8, 0.15, window=1),
            LayerSpec(1, 1, 1, 6, 0.2, window=17),
        ),
    ),
    # As DeepSeek's models: of a token one latent row is kept, whose front are the values. And a layer with a window.
    "latent": Geometry(
        (CacheSpec(32, 1, 96, 64, "float32", latent=True),),
        (LayerSpec(0, 0, 0, 5, 0.1), LayerSpec(0, 1, 0, 5, 0.1, window=40), LayerSpec(0, 0, 1, 5, 0.1)),
    ),
}


@contextlib.contextmanager
def client_of(
    workers: list[EmbeddedAttentionWorker], geometry: Geometry, kind: str, num_workers: int
) -> Iterator[tuple[AttentionClient, list[AttentionWorkerConnection], list[range]]]:
    """A client, its connections, and the ranges of block ids that lie on one worker."""
    caches = geometry.divisible_heads
    by_heads = [
        [heads // num_workers + (w < heads % num_workers) for heads in caches] for w in range(num_workers)
    ]
    blocks = [NUM_BLOCKS // num_workers + w for w in range(num_workers)]
    with contextlib.ExitStack() as stack:
        connections = []
        for w in range(num_workers):
            part = geometry
            if kind == "heads":
                first = [sum(shares) for shares in zip(*by_heads[:w], strict=True)] or [0] * len(caches)
                part = geometry.with_heads(first, by_heads[w])
            connections.append(stack.enter_context(AttentionWorkerConnection.connect(workers[w].address)))
            connections[-1].configure(
                part,
                NUM_BLOCKS if kind == "heads" else blocks[w],
                ring_bytes=4 << 20,
                spin_us=0,
                worker_spin_us=0,
                heartbeat_timeout=DEADLINE,
            )
        native = geometry.to_native()
        partition = (
            Partition.by_heads(native, by_heads) if kind == "heads" else Partition.by_blocks(native, blocks)
        )
        pieces = ranges([NUM_BLOCKS]) if kind == "heads" else ranges(blocks)
        yield (
            AttentionClient([connection.channel for connection in connections], partition),
            connections,
            pieces,
        )


@pytest.mark.parametrize(("kind", "num_workers"), [("heads", 1), ("heads", 2), ("blocks", 2), ("blocks", 3)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_random_steps(workers: list[EmbeddedAttentionWorker], name: str, kind: str, num_workers: int) -> None:
    geometry = GEOMETRIES[name]
    with client_of(workers, geometry, kind, num_workers) as (client, connections, pieces):
        num_blocks = sum(len(piece) for piece in pieces) + 1
        workload = Workload(Engine(client, geometry, num_blocks), pieces, seed=num_workers)
        for _ in range(40):
            workload.step()
        for connection in connections:
            assert connection.stats().tokens_appended > 0
            assert connection.stats().rejected_frames == 0


def test_blocks_are_zeroed_and_copied_at_all_positions(workers: list[EmbeddedAttentionWorker]) -> None:
    geometry = GEOMETRIES["shapes"]
    with client_of(workers, geometry, "heads", 1) as (client, _, _):
        engine = Engine(client, geometry, NUM_BLOCKS)
        request = Request(0, 64, [1, 2], [[3, 4, 5, 6], [7]])
        engine.step(0, [request])
        pairs = {1: 11, 2: 12, 3: 13, 4: 14, 5: 15, 6: 16, 7: 17}
        client.copy_blocks(np.array(list(pairs.items()), np.int32))
        client.zero_blocks(np.array([5, 12], np.int32))
        for layer, k, v in zip(geometry.layers, engine.k, engine.v, strict=True):
            size = geometry.block_size(layer.group)
            for cache in (k, v):
                for source, to in pairs.items():
                    cache[to * size : (to + 1) * size] = cache[source * size : (source + 1) * size]
                for zeroed in (5, 12):
                    cache[zeroed * size : (zeroed + 1) * size] = 0
        engine.step(1, [Request(64, 1, [11, 12, 21], [[13, 14, 15, 16, 23], [17, 24]])])


def test_a_worker_gets_frames_only_of_layers_that_it_has_a_part_in(
    workers: list[EmbeddedAttentionWorker],
) -> None:
    geometry = GEOMETRIES["soft-cap and sharing"]
    with client_of(workers, geometry, "blocks", 2) as (client, connections, _):
        engine = Engine(client, geometry, NUM_BLOCKS + 1)
        # The window's blocks lie on the second worker, the others on the first.
        engine.step(0, [Request(0, 40, [100, 101], [[1, 2]])])
        # A STEP each, and an ATTEND of the layer that stores.
        assert [connection.stats().messages for connection in connections] == [2, 2]
        engine.step(1, [Request(40, 1, [100, 101], [[1, 2]])])
        assert [connection.stats().messages for connection in connections] == [5, 5]
