"""What layers do with scores, every kernel variant against the float64 reference."""

import numpy as np
import pytest
from pool import VARIANTS, Geometry, Pool, Queries
from reference import Rule

from vllm_lamina.kernels import ScoreRule

SCALE = 0.125
KV_LENS = [1, 31, 32, 33, 64, 100, 300]
FLOAT32_ISAS = [isa for dtype, isa in VARIANTS if dtype == "float32"]


def make_pool(dtype: str, isa: str, kv_lens: list[int], **options: int) -> Pool:
    return Pool(Geometry(dtype, 6, 2, 64, 32), isa, kv_lens, num_threads=2, **options)


def spoil_unseen_blocks(pool: Pool, queries: Queries, rule: Rule) -> int:
    """Fill with NaN every block of which no query token of its request sees a token; say how many there are."""
    size, count = pool.geometry.block_size, 0
    for request, position in enumerate(pool.positions(queries)):
        at = position + np.arange(queries.lens[request])
        seen = rule.sees(at, pool.key_positions(queries, request)).any(axis=0)
        for block in range(-(-len(seen) // size)):
            if not seen[block * size : (block + 1) * size].any():
                pool.layer[pool.block_tables[request, block]] = 0xFF
                count += 1
    return count


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize("window", [1, 5, 32, 1000])
def test_window_reads_only_the_window(dtype: str, isa: str, window: int) -> None:
    """Decodes, and prefill chunks of which the first rows see some of their context: all else is NaN."""
    rule = Rule(SCALE, window=window)
    for lens in ([1] * len(KV_LENS), [min(7, window)] * len(KV_LENS), [40] * len(KV_LENS)):
        pool, queries = make_pool(dtype, isa, KV_LENS), Queries(lens)
        spoiled = spoil_unseen_blocks(pool, queries, rule)
        assert window == 1000 or spoiled > 10
        pool.check(queries, rule)


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize("chunk", [1, 24, 64, 1000])
def test_chunk_reads_only_the_chunk(dtype: str, isa: str, chunk: int) -> None:
    rule = Rule(SCALE, chunk=chunk)
    for lens in ([1] * len(KV_LENS), [40] * len(KV_LENS)):
        pool, queries = make_pool(dtype, isa, KV_LENS), Queries(lens)
        spoiled = spoil_unseen_blocks(pool, queries, rule)
        assert chunk == 1000 or spoiled > 3
        pool.check(queries, rule)


@pytest.mark.parametrize("isa", FLOAT32_ISAS)
def test_later_rows_of_a_chunk_read_less(isa: str) -> None:
    """No tile of rows reads what only the rows of an earlier tile see: later rows stay finite beside its NaN."""
    pool = Pool(Geometry("float32", 4, 1, 32, 32), isa, [320])
    rule, queries = Rule(SCALE, window=300), Queries([300])
    q = pool.tokens(300, 4)
    expected = pool.expected(q, queries, rule)
    pool.layer[pool.block_tables[0, 0]] = 0xFF
    out, lse = pool.attend(q, queries, rule)
    assert np.isnan(out[0]).all()
    # Tokens from 11 on see nothing of the first block; a tile has at most 128 rows: 32 tokens of 4 heads.
    for part, wanted in zip((out, lse), expected, strict=True):
        np.testing.assert_allclose(part[32:], wanted[32:], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_soft_cap(dtype: str, isa: str) -> None:
    """Most scores are far beyond the cap: without it the softmax would be another."""
    pool = make_pool(dtype, isa, KV_LENS)
    pool.check(Queries([1, 1, 1, 1, 1, 1, 40]), Rule(1.0, soft_cap=5.0))
    pool.check(Queries([1] * 7), Rule(SCALE, soft_cap=50.0))


@pytest.mark.parametrize("isa", FLOAT32_ISAS)
@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_accuracy_of_the_soft_cap(isa: str, soft_cap: float) -> None:
    """The LSE over a single key is its score."""
    pool = Pool(Geometry("float32", 1, 1, 32, 32), isa, [1])
    one_hot = np.zeros((1, 1, 32), np.float32)
    one_hot[0, 0, 3] = 1
    pool.append(0, 0, one_hot, one_hot)
    small = 10.0 ** np.arange(-30, 3)
    scores = np.concatenate([np.linspace(-12, 12, 2001), small, -small, [np.inf, -np.inf]]) * soft_cap
    q = np.zeros((len(scores), 1, 32), np.float32)
    q[:, 0, 3] = scores
    _, lse = pool.attend(
        np.where(np.isinf(q), np.sign(q) * np.float32(1e38), q), Queries([len(q)]), Rule(1.0, soft_cap)
    )
    wanted = soft_cap * np.tanh(q[:, 0, 3].astype(np.float64) / soft_cap)
    np.testing.assert_allclose(lse[:, 0], wanted, rtol=1e-6, atol=1e-30)
    _, lse = pool.attend(np.full((1, 1, 32), np.nan, np.float32), Queries([1]), Rule(1.0, soft_cap))
    assert np.isnan(lse).all()


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_sinks_are_counted_once_for_complete_tokens(dtype: str, isa: str) -> None:
    """Also where an item is split over threads, where nothing is seen, and where the sink outweighs all keys."""
    rule = Rule(SCALE, sinks=(0.0, 3.0, -2.0, 8.0, -90.0, 20.0))
    for kv_lens, lens in (([700], [1]), ([0, 40, 900, 0], [1, 1, 1, 1]), ([0, 200], [3, 70])):
        pool = Pool(Geometry(dtype, 6, 2, 64, 32), isa, kv_lens, num_threads=3)
        for complete in {0, 1, sum(lens)}:
            pool.check(Queries(lens, num_complete=complete), rule)
    out, lse = pool.attend(pool.tokens(73, 6), Queries([3, 70], num_complete=2), rule)
    assert not out[:3].any()
    np.testing.assert_array_equal(lse[:2], [rule.sinks] * 2)
    assert np.all(lse[2] == -np.inf)


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_alibi(dtype: str, isa: str) -> None:
    rule = Rule(SCALE, alibi_slopes=tuple(2.0 ** -np.arange(1, 7)))
    make_pool(dtype, isa, KV_LENS).check(Queries([1] * 7), rule)
    make_pool(dtype, isa, [20, 300]).check(Queries([50, 130]), rule)


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_blocks_at_other_positions(dtype: str, isa: str, shuffled: bool) -> None:
    """A worker holds some of a request's blocks, in order or not: rules go by where these are in the request.

    ALiBi takes scores to -200, of which an ulp is 1.5e-5: the relative error of a weight.
    """
    rng = np.random.default_rng(11)
    kv_lens = [5, 64, 300]
    pool = make_pool(dtype, isa, kv_lens)
    blocks = np.sort(np.stack([rng.permutation(25)[: pool.block_tables.shape[1]] for _ in kv_lens]))
    if shuffled:
        blocks = rng.permuted(blocks, axis=1)
    block_positions = (blocks * 32).astype(np.int32)
    slopes = tuple(2.0 ** -np.arange(2, 8))
    for rule in (Rule(SCALE, alibi_slopes=slopes), Rule(SCALE, window=300), Rule(SCALE, chunk=200)):
        for lens in ([1, 1, 1], [1, 60, 3]):
            pool.check(Queries(lens, [25 * 32 + 7, 25 * 32, 25 * 32 + 99], block_positions), rule, slack=5)


@pytest.mark.parametrize(("dtype", "isa"), VARIANTS)
def test_random_rules(dtype: str, isa: str) -> None:
    """Rules in all combinations, on random geometries and requests."""
    rng = np.random.default_rng(5)
    for seed in range(12):
        kv_heads = int(rng.integers(1, 4))
        heads = kv_heads * int(rng.integers(1, 17))
        sizes = (16 * rng.integers(2, 17, 2)).tolist()
        geometry = Geometry(dtype, heads, kv_heads, sizes[0], 16 * int(rng.integers(1, 9)), sizes[1])
        requests = int(rng.integers(1, 5))
        kv_lens = rng.integers(0, 300, requests).tolist()
        lens = np.where(rng.random(requests) < 0.5, 1, rng.integers(1, 60, requests)).tolist()
        window, chunk, cap, sinks, slopes = rng.random(5) < 0.5
        rule = Rule(
            SCALE,
            soft_cap=float(rng.uniform(1, 50)) if cap else 0.0,
            window=int(rng.integers(1, 200)) if window else 0,
            chunk=int(rng.integers(1, 200)) if chunk else 0,
            sinks=tuple(rng.normal(0, 3, heads)) if sinks else (),
            alibi_slopes=tuple(rng.uniform(0, 0.2, heads)) if slopes else (),
        )
        queries = Queries(lens, num_complete=int(rng.integers(0, sum(lens) + 1)))
        pool = Pool(
            geometry, isa, kv_lens, num_threads=int(rng.integers(1, 4)), seed=seed, padding=64 * (seed % 2)
        )
        spoil_unseen_blocks(pool, queries, rule)
        pool.check(queries, rule)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"soft_cap": -1.0}, r"soft_cap = -1\.0+ must be a positive number, or 0"),
        ({"window": -1}, "window = -1 must be a number of tokens, or 0"),
        ({"chunk": -8}, "chunk = -8 must be a number of tokens, or 0"),
        ({"scale": float("nan")}, "scale = nan must be finite"),
        ({"sinks": [0.0]}, "sinks has 1 values for 2 query heads: give one for each, or none"),
        ({"alibi_slopes": [0.5, float("inf")]}, "alibi_slopes holds inf: use finite numbers"),
    ],
)
def test_refusals_say_what_to_change(fields: dict[str, object], message: str) -> None:
    pool = Pool(Geometry("float32", 2, 1, 32, 32), "portable", [4])
    rule: dict = {"scale": 1.0, **fields}
    with pytest.raises(ValueError, match=message):
        pool.attend(pool.tokens(1, 2), Queries([1]), Rule(**rule))


def test_rules_by_position_need_positions() -> None:
    pool = Pool(Geometry("float32", 2, 1, 32, 32), "portable", [4])
    starts, q = np.array([0, 1], np.int32), pool.tokens(1, 2)
    common = pool.layer, q, starts, pool.kv_lens, pool.block_tables
    with pytest.raises(ValueError, match="a window, a chunk and ALiBi need one position for each request"):
        pool.kernel.attend(*common, ScoreRule(1.0, window=3), pool.threads)
    with pytest.raises(ValueError, match="num_complete_tokens = 2 is not among q's tokens"):
        pool.kernel.attend(*common, ScoreRule(1.0), pool.threads, num_complete_tokens=2)
