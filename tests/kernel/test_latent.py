"""Latent caches, whose values are the front of their keys: every kernel variant against the float64 reference."""

import numpy as np
import pytest
from pool import VARIANTS, Geometry, Pool, Queries
from reference import Rule

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

SIZES = [(576, 512), (288, 256), (320, 256), (96, 96), (80, 48), (1024, 32)]


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize(("head_size", "head_size_v"), SIZES)
def test_sizes(dtype: str, isa: str, head_size: int, head_size_v: int) -> None:
    """Of DeepSeek's models first; decodes and a prefill chunk, of as many rows as take several tiles."""
    geometry = Geometry(dtype, 20, 1, head_size, 32, head_size_v, latent=True)
    pool = Pool(geometry, isa, [1, 45, 97], num_threads=2, chunk=13)
    pool.check(Queries([1, 1, 9]))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize("num_heads", [1, 2, 7, 16, 33, 128])
def test_query_heads(dtype: str, isa: str, num_heads: int) -> None:
    Pool(Geometry(dtype, num_heads, 1, 576, 64, 512, latent=True), isa, [70, 300], num_threads=3).check(
        Queries([1, 2])
    )


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize("block_size", [16, 32, 80, 128])
def test_lengths(dtype: str, isa: str, block_size: int) -> None:
    """Around the edges of vectors, tiles and blocks: what a block held before is not read."""
    edges = [0, 1, 2, 15, 16, 17, 31, 32, 33]
    edges += [n * block_size + d for n in (1, 3) for d in (-1, 0, 1)]
    pool = Pool(Geometry(dtype, 4, 1, 96, block_size, 64, latent=True), isa, edges)
    pool.check(Queries([1] * len(edges)))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_rules(dtype: str, isa: str) -> None:
    pool = Pool(Geometry(dtype, 4, 1, 96, 32, 64, latent=True), isa, [150, 90], num_threads=2)
    rule = Rule(
        0.1, soft_cap=2.0, window=60, sinks=(0.5, -1.0, 2.0, 0.0), alibi_slopes=(0.1, 0.05, 0.02, 0.01)
    )
    pool.check(Queries([1, 5], num_complete=1), rule)


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_a_token_is_kept_once(dtype: str, isa: str) -> None:
    pool = Pool(Geometry(dtype, 8, 1, 576, 128, 512, latent=True), isa, [200])
    assert pool.kernel.block_bytes == 128 * 576 * ELEMENT_BYTES[dtype]
    pieces = Pool(pool.geometry, isa, [200], chunk=7, num_threads=2)
    np.testing.assert_array_equal(pool.layer, pieces.layer)
