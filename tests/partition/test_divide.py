"""Shares of several attention workers: who holds what, how many tokens that makes, and what is refused."""

from __future__ import annotations

import random
import re

import pytest

from vllm_lamina.config import AUTO, HEAD, REQUEST, SEQUENCE
from vllm_lamina.errors import ConfigError
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.kv_cache.partition import Partition, Pool, divide
from vllm_lamina.units import parse_bytes

BYTES_PER_HEAD = 1000
MIB = 1 << 20


def geometry(kv_heads: int) -> Geometry:
    return Geometry.uniform(2, 32, 2 * kv_heads, kv_heads, 64, "float32", (0.1, 0.1))


def parts(wanted: str, kv_heads: int, pools: list[int], max_model_len: int = 1024) -> Partition:
    return divide(
        wanted,
        [Pool(f"127.0.0.1:{7100 + i}", size) for i, size in enumerate(pools)],
        geometry(kv_heads),
        lambda worker, part: part.caches[0].num_kv_heads * BYTES_PER_HEAD,
        max_model_len,
    )


def heads(partition: Partition) -> list[int]:
    for share in partition.shares:
        assert share.geometry.layers[0].num_heads == 2 * share.heads[0]
    return [share.heads[0] for share in partition.shares]


@pytest.mark.parametrize("wanted", [AUTO, HEAD, SEQUENCE, REQUEST])
def test_one_worker_holds_everything(wanted: str) -> None:
    partition = parts(wanted, 3, [30_500])
    assert (heads(partition), partition.num_blocks) == ([3], 10)


@pytest.mark.parametrize(
    ("kv_heads", "pools", "expected", "num_blocks"),
    [
        (8, [40_000, 40_000], [4, 4], 10),
        (3, [40_000, 40_000], [1, 2], 20),
        (4, [40_000, 20_000, 20_000], [2, 1, 1], 20),
        (8, [70_000, 10_000], [7, 1], 10),
        (2, [90_000, 10_000], [1, 1], 10),
    ],
)
def test_heads_follow_the_pools(
    kv_heads: int, pools: list[int], expected: list[int], num_blocks: int
) -> None:
    partition = parts(HEAD, kv_heads, pools)
    assert sorted(heads(partition)) == sorted(expected)
    assert partition.num_blocks == num_blocks


def test_more_workers_than_heads() -> None:
    with pytest.raises(ConfigError, match="a KV head for every attention worker; the model has 2 for 3"):
        parts(HEAD, 2, [10_000] * 3)
    assert parts(SEQUENCE, 2, [10_000] * 3).num_blocks == 15


@pytest.mark.parametrize(
    ("kv_heads", "pools", "max_model_len", "kind", "reason"),
    [
        (8, [160_000, 150_000], 1024, HEAD, "8 KV heads divide evenly, and the pools are about equal"),
        (8, [800_000, 2_000_000], 512, REQUEST, "the pools differ, and every pool holds 4"),
        (3, [800_000, 800_000], 512, REQUEST, "3 KV heads do not divide by 2"),
        (3, [800_000, 800_000], 64_000, SEQUENCE, "long requests would not fit one worker several times"),
        (1, [800_000, 90_000], 4096, SEQUENCE, "long requests would not fit"),
    ],
)
def test_auto(kv_heads: int, pools: list[int], max_model_len: int, kind: str, reason: str) -> None:
    partition = parts(AUTO, kv_heads, pools, max_model_len)
    assert partition.kind == kind
    assert reason in partition.reason


def test_fewer_blocks_are_spread_in_proportion() -> None:
    rng = random.Random(0)
    for _ in range(300):
        pools = [rng.randrange(1_000, 60_000) for _ in range(rng.randrange(2, 6))]
        partition = parts(SEQUENCE, 1, pools)
        full = partition.blocks_per_worker
        num_blocks = rng.randrange(len(pools), partition.num_blocks + 1)
        limited = partition.limited_to(num_blocks).blocks_per_worker
        assert sum(limited) == num_blocks
        for count, most in zip(limited, full, strict=True):
            assert 1 <= count <= most
            assert abs(count - num_blocks * most / sum(full)) < 2
    assert parts(HEAD, 4, [40_000, 40_000]).limited_to(7).blocks_per_worker == [7, 7]


@pytest.mark.parametrize("num_blocks", [1, 41])
def test_block_counts_that_are_impossible(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match=rf"{num_blocks} KV blocks are asked for; 2 .* hold 40"):
        parts(SEQUENCE, 1, [20_000, 20_000]).limited_to(num_blocks)


@pytest.mark.parametrize(
    ("wanted", "pools", "message"),
    [
        (
            HEAD,
            [2 * MIB],
            r"worker's pool of 2 MiB holds .* raise --lamina-memory \(or the worker's --memory\)",
        ),
        (HEAD, [99 * MIB, 2 * MIB], r"worker at 127.0.0.1:7101 \(2 MiB\) holds .* of its 1 of 4 KV heads"),
        (SEQUENCE, [MIB, 2 * MIB], r"pools of the 2 attention workers \(3 MiB\) hold .* of any of them"),
    ],
)
def test_pools_too_small_for_one_request(wanted: str, pools: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parts(wanted, 4, pools).check_holds_one_request(1 << 20)
    parts(wanted, 4, pools).check_holds_one_request(1024)


@pytest.mark.parametrize("max_model_len", range(1100, 9000, 700))
def test_the_memory_that_the_message_asks_for_is_enough(max_model_len: int) -> None:
    for sharing in (1, 3):
        with pytest.raises(ConfigError) as caught:
            parts(HEAD, 4, [MIB // 10]).check_holds_one_request(max_model_len, sharing)
        [size] = re.findall(
            r"needs (.*?): raise" if sharing == 1 else r"at least (.*), or", str(caught.value)
        )
        pool = parse_bytes(size) // sharing
        parts(HEAD, 4, [pool]).check_holds_one_request(max_model_len, sharing)
        assert pool < 1.02 * 4 * BYTES_PER_HEAD * (-(-max_model_len // 32) + 1)


def test_blocks_that_must_be_left() -> None:
    """Of a hybrid model: vLLM checks as if its states took some."""
    pools = parts(HEAD, 4, [4 * BYTES_PER_HEAD * (1024 // 32 + 3)])
    pools.check_holds_one_request(1024, spare_blocks=2)
    with pytest.raises(ConfigError, match="needs"):
        pools.check_holds_one_request(1024, spare_blocks=3)


def test_a_pool_smaller_than_a_block() -> None:
    with pytest.raises(ConfigError, match=r"worker at 127.0.0.1:7101 .* is smaller than one KV block"):
        parts(REQUEST, 4, [MIB, 3_999])
