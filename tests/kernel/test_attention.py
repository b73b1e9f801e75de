"""Every kernel variant of this machine against the float64 reference."""

import doctest

import numpy as np
import pytest
from pool import LSE_TOLERANCE, OUT_TOLERANCE, VARIANTS, Geometry, Pool, Queries
from reference import Rule

from vllm_lamina import kernels
from vllm_lamina.kernels import AttentionKernel


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 192, 256, 320, 512])
def test_head_sizes(dtype: str, isa: str, head_size: int) -> None:
    Pool(Geometry(dtype, 6, 2, head_size, 32), isa, [1, 45, 97]).check(Queries([1, 1, 2]))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize(("head_size", "head_size_v"), [(192, 128), (64, 512), (48, 32), (80, 96), (512, 64)])
def test_values_of_another_size(dtype: str, isa: str, head_size: int, head_size_v: int) -> None:
    geometry = Geometry(dtype, 6, 2, head_size, 32, head_size_v)
    pool = Pool(geometry, isa, [1, 45, 97], num_threads=2, chunk=13)
    pool.check(Queries([1, 1, 50]))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_blocks_that_lie_apart(dtype: str, isa: str) -> None:
    """Between the blocks is other memory: neither written nor read."""
    pool = Pool(Geometry(dtype, 4, 2, 64, 32), isa, [70, 33], padding=192)
    pool.check(Queries([1, 1]))
    first, second = pool.block_tables[1, :2].tolist()
    pool.kernel.copy_block(pool.layer, first, second)
    pool.kernel.zero_block(pool.layer, first)
    assert pool.layer[second].any()
    assert not pool.layer[first].any()
    assert np.all(pool.memory[:, pool.kernel.block_bytes :] == 0xFF)


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"),
    [(2, 2), (4, 2), (3, 1), (8, 2), (5, 1), (6, 1), (14, 2), (16, 2), (16, 1), (64, 2), (40, 1), (71, 1)],
)
def test_groups(dtype: str, isa: str, num_heads: int, num_kv_heads: int) -> None:
    Pool(Geometry(dtype, num_heads, num_kv_heads, 64, 64), isa, [70, 129], num_threads=2).check(
        Queries([1, 2])
    )


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize("block_size", [16, 32, 80, 128])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_lengths(dtype: str, isa: str, block_size: int, num_threads: int) -> None:
    """Around the edges of vectors, tiles and blocks, with empty contexts between, split over threads."""
    edges = [0, 1, 2, 15, 16, 17, 31, 32, 33, 0]
    edges += [n * block_size + d for n in (1, 2, 5) for d in (-1, 0, 1)]
    pool = Pool(Geometry(dtype, 4, 1, 64, block_size), isa, edges, num_threads=num_threads)
    pool.check(Queries([1] * len(edges)))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize("query_len", [7, 33, 300])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_prefill_over_context(dtype: str, isa: str, query_len: int, num_threads: int) -> None:
    """Many query tokens beside decodes, in tiles of rows."""
    pool = Pool(Geometry(dtype, 6, 2, 64, 64), isa, [200, 64, 0, 500], num_threads=num_threads)
    pool.check(Queries([1, query_len, 2, query_len]))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize("chunk", [1, 5, 16, 50])
def test_append_in_pieces(dtype: str, isa: str, chunk: int) -> None:
    """Decode's single tokens and prefill chunks fill a block to the same bytes."""
    geometry = Geometry(dtype, 2, 2, 80, 32, 48)
    whole = Pool(geometry, isa, [75], seed=3)
    pieces = Pool(geometry, isa, [75], seed=3, chunk=chunk, num_threads=2)
    np.testing.assert_array_equal(whole.layer, pieces.layer)
    pieces.check(Queries([1]))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_append_skips_negative_slots(dtype: str, isa: str) -> None:
    pool = Pool(Geometry(dtype, 2, 2, 64, 32), isa, [20])
    before = pool.layer.copy()
    tokens = pool.tokens(3, 2)
    pool.kernel.append(pool.layer, tokens, tokens, np.full(3, -1, np.int64), pool.threads)
    np.testing.assert_array_equal(pool.layer, before)


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_random_grid(dtype: str, isa: str) -> None:
    rng = np.random.default_rng(7)
    for seed in range(12):
        kv_heads = int(rng.integers(1, 4))
        geometry = Geometry(
            dtype,
            kv_heads * int(rng.integers(1, 33)),
            kv_heads,
            16 * int(rng.integers(2, 17)),
            16 * int(rng.integers(1, 9)),
        )
        requests = int(rng.integers(1, 5))
        lens = rng.integers(0, 400, requests).tolist()
        pool = Pool(geometry, isa, lens, num_threads=int(rng.integers(1, 3)), seed=seed)
        pool.check(Queries(rng.integers(1, 40, requests).tolist()))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_peaked_and_flat_scores(dtype: str, isa: str) -> None:
    """Scores in the hundreds: weights below the smallest float32 vanish, the largest stays 1.

    An ulp of such a score is 3e-5, and that is the relative error of its weight.
    """
    pool = Pool(Geometry(dtype, 8, 2, 64, 32), isa, [100, 333], num_threads=2)
    pool.check(Queries([3, 1]), Rule(8.0), slack=10)
    pool.check(Queries([3, 1]), Rule(1e-6))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_infinite_and_nan_scores(dtype: str, isa: str) -> None:
    """A query whose every score is -inf has no weights; a NaN query is NaN and spoils no other row."""
    pool = Pool(Geometry(dtype, 2, 1, 32, 32), isa, [40])
    k, v = pool.tokens(40, 1), pool.tokens(40, 1)
    one, minus_inf, nan = (
        {"float32": x, "float16": x, "bfloat16": b}[dtype]
        for x, b in ((1.0, 0x3F80), (-np.inf, 0xFF80), (np.nan, 0x7FC0))
    )
    k[:] = one
    pool.append(0, 0, k, v)
    q = pool.tokens(3, 2)
    q[0], q[1] = minus_inf, nan
    out, lse = pool.attend(q, Queries([3]), Rule(1.0))
    assert np.all(out[0] == 0)
    assert np.all(lse[0] == -np.inf)
    assert np.all(np.isnan(out[1]))
    assert np.all(np.isnan(lse[1]))
    assert np.all(np.isfinite(out[2]))


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_threads_agree(dtype: str, isa: str) -> None:
    """Splitting over threads changes rounding only."""
    geometry, lens = Geometry(dtype, 8, 2, 128, 128), [1000, 3, 700]
    one, three = (Pool(geometry, isa, lens, num_threads=n) for n in (1, 3))
    q = one.tokens(3, 8)
    asked = q, Queries([1, 1, 1]), Rule(0.1)
    for a, b in zip(one.attend(*asked), three.attend(*asked), strict=True):
        np.testing.assert_allclose(a, b, **OUT_TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_copy_and_zero_block(dtype: str, isa: str) -> None:
    pool = Pool(Geometry(dtype, 2, 1, 64, 32), isa, [32, 32])
    q = pool.tokens(2, 2)
    first, second = (int(table[0]) for table in pool.block_tables)
    pool.kernel.copy_block(pool.layer, first, second)
    out, lse = pool.attend(np.concatenate([q[:1], q[:1]]), Queries([1, 1]), Rule(0.1))
    np.testing.assert_array_equal(out[0], out[1])
    pool.kernel.zero_block(pool.layer, second)
    out, lse = pool.attend(q, Queries([1, 1]), Rule(0.1))
    assert not out[1].any()
    np.testing.assert_allclose(lse[1], np.log(32), **LSE_TOLERANCE)
    with pytest.raises(ValueError, match="block -1 is outside the layer's 4 blocks"):
        pool.kernel.copy_block(pool.layer, 0, -1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_size": 72}, r"head_size = 72 must be a multiple of 16 from 32 to 1024"),
        ({"head_size_v": 1040}, r"head_size_v = 1040 must be"),
        ({"latent": True}, r"a latent cache has one KV head.*num_kv_heads = 2, head_size = 64"),
        ({"num_kv_heads": 1, "latent": True, "head_size_v": 80}, r"values no longer than its keys.* = 80"),
        ({"block_size": 24}, r"block_size = 24 must be a multiple of 16: set vLLM's --block-size"),
        ({"num_heads": 5}, r"num_heads = 5 must be a positive multiple of num_kv_heads = 2"),
        ({"isa": "amx", "dtype": "float32"}, r"amx kernel is not available .*; available: portable"),
        (
            {"isa": "avx512_bf16", "dtype": "float16"},
            r"avx512_bf16 kernel is not available .*; available: portable",
        ),
        ({"isa": "neon"}, r"unknown instruction set 'neon': use portable"),
        ({"dtype": "int8"}, r"unknown dtype 'int8': use float32"),
    ],
)
def test_refusals_say_what_to_change(changed: dict[str, object], message: str) -> None:
    options: dict = {"dtype": "float32", "num_heads": 4, "num_kv_heads": 2, "head_size": 64, "block_size": 32}
    with pytest.raises(ValueError, match=message):
        AttentionKernel(**{**options, **changed})


def test_out_of_range_arguments_are_refused() -> None:
    pool = Pool(Geometry("float32", 4, 2, 64, 32), "portable", [10])
    tokens = pool.tokens(1, 2)
    slots = len(pool.layer) * 32
    with pytest.raises(ValueError, match=f"slot {slots} is outside the layer's {slots} slots"):
        pool.kernel.append(pool.layer, tokens, tokens, np.array([slots]), pool.threads)
    with pytest.raises(ValueError, match=r"k must be \[tokens, 2, 64\]"):
        pool.kernel.append(pool.layer, tokens[:, :, :32].copy(), tokens, np.array([0]), pool.threads)
    pool.kv_lens[0] = 33
    with pytest.raises(ValueError, match="kv_len 33 does not fit its block table"):
        pool.attend(pool.tokens(1, 4), Queries([1]), Rule(1.0))


def test_a_copy_is_never_written_instead_of_the_layer() -> None:
    pool = Pool(Geometry("float32", 4, 2, 64, 32), "portable", [10])
    tokens = pool.tokens(1, 2)
    with pytest.raises(TypeError):
        pool.kernel.append(pool.layer.astype(np.int8), tokens, tokens, np.array([0]), pool.threads)
    halves = pool.layer.reshape(len(pool.layer) * 2, -1)
    with pytest.raises(ValueError, match=r"a layer must be \[blocks, 32768\], each block contiguous"):
        pool.kernel.append(halves, tokens, tokens, np.array([0]), pool.threads)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(kernels).failed == 0
