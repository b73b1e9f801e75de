"""The geometry of a model's layers: what does not fit together is refused, and what a request takes of the pool."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import pytest

from vllm_lamina.errors import ConfigError
from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, Group, LayerSpec
from vllm_lamina.kv_cache.partition import Pool, divide

CACHE = CacheSpec(32, 2, 64, 64, "float32")
LARGE = CacheSpec(64, 4, 128, 64, "float32")


def layer(**fields: Any) -> LayerSpec:
    return msgspec.structs.replace(LayerSpec(0, 0, 0, 4, 0.125), **fields)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((), "the number of attention layers = 0 must be from 1 to 4096"),
        ((layer(cache=2), layer(position=1)), "layer 0: cache = 2 must be from 0 to 1"),
        ((layer(group=2), layer(position=1)), "layer 0: group = 2 must be from 0 to 1"),
        ((layer(), layer(position=2)), "layer 1: position = 2 must be from 0 to 1"),
        ((layer(), layer()), "layer 1 stores at position 0 of group 0, as another layer does"),
        (
            (layer(), layer(group=1, position=1)),
            "no layer stores at position 0 of group 1, but one at position 1",
        ),
        ((layer(position=1), layer(position=1, group=1)), "no layer stores at position 0 of group 0"),
        (
            (layer(stores=False), layer()),
            "layer 0 shares the KV at position 0 of group 0, where no layer before",
        ),
        ((layer(), layer(cache=1, stores=False)), "whose cache is 0, not 1"),
        ((layer(), layer(position=1, cache=1)), "group 0 has blocks of 32 and of 64 tokens"),
        ((layer(), layer(num_heads=0, position=1)), "layer 1: num_heads = 0 must be from 1"),
        ((layer(), layer(window=-1, position=1)), "layer 1: window = -1 must be a number of tokens"),
        ((layer(), layer(chunk=-1, position=1)), "chunk = -1 must be a number of tokens"),
        ((layer(), layer(scale=math.nan, position=1)), "scale = nan must be finite"),
        ((layer(), layer(soft_cap=-1.0, position=1)), "soft_cap = -1.0.* must be a positive number"),
        ((layer(), layer(sinks=(1.0, 2.0), position=1)), "sinks has 2 values for 4 query heads"),
        ((layer(), layer(alibi_slopes=(math.inf,) * 4, position=1)), "alibi_slopes holds inf"),
    ],
)
def test_what_does_not_fit_together(layers: tuple[LayerSpec, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Geometry((CACHE, LARGE), layers)
    # The same from another process.
    message = {
        "caches": msgspec.to_builtins((CACHE, LARGE)),
        "layers": [msgspec.structs.asdict(spec) for spec in layers],
    }
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Geometry)


def test_groups_and_pages() -> None:
    layers = (
        layer(window=100),
        layer(group=1, cache=1),
        layer(position=1, window=50),
        layer(group=1, stores=False, cache=1, window=7),
        layer(group=2, chunk=64),
        layer(group=2, position=1, chunk=64),
        layer(group=2, position=2, chunk=64, window=9),
    )
    geometry = Geometry((CACHE, LARGE), layers)
    assert geometry.groups == (Group(32, 100, 0), Group(64, 0, 0), Group(32, 0, 64))
    assert geometry.shared_places == {(1, 0)}
    small, large = (Geometry((cache,), (layer(),)).block_bytes() for cache in (CACHE, LARGE))
    # At position 0 the largest of three layers, at the others there are small ones only.
    assert geometry.block_bytes() == large + 2 * small
    packed = msgspec.msgpack.encode(geometry)
    assert msgspec.msgpack.decode(packed, type=Geometry) == geometry


@pytest.mark.parametrize(
    ("group", "context", "query", "expected"),
    [
        (Group(32, 0, 0), 0, 5, 0),
        (Group(32, 0, 0), 7, 5, 5),
        (Group(32, 4, 0), 7, 5, 3),
        (Group(32, 1, 0), 7, 5, 0),
        (Group(32, 0, 8), 7, 5, 1),
        (Group(32, 0, 8), 8, 5, 0),
        (Group(32, 0, 8), 9, 5, 5),
        (Group(32, 3, 8), 9, 5, 2),
    ],
)
def test_rows_that_see_context(group: Group, context: int, query: int, expected: int) -> None:
    """Against the definition: row i, at position context + i, sees some position before the context's end."""

    def sees(position: int, key: int) -> bool:
        within = not group.window or key > position - group.window
        return within and (not group.chunk or key >= position // group.chunk * group.chunk)

    rows = [any(sees(context + i, key) for key in range(context)) for i in range(query)]
    assert rows == [i < expected for i in range(query)]
    assert group.context_rows(context, query) == expected


def test_a_window_holds_fewer_blocks() -> None:
    geometry = Geometry((CACHE,), (layer(), layer(group=1, window=64), layer(group=2, chunk=128)))
    assert geometry.num_blocks(1000, 100) == 32 + 7 + 8
    assert geometry.num_blocks(1000) == 32 + 3 + 4
    assert geometry.num_blocks(10, 100) == 3
    block = geometry.block_bytes()
    whole = divide("sequence", [Pool("a:1", 48 * block)], geometry, lambda _, part: part.block_bytes(), 1000)
    whole.check_holds_one_request(1000, max_step_tokens=100)
    with pytest.raises(ConfigError, match="raise --lamina-memory"):
        whole.limited_to(47).check_holds_one_request(1000, max_step_tokens=100)


def test_heads_of_each_cache_are_divided() -> None:
    sinks, slopes = tuple(float(i) for i in range(8)), tuple(float(-i) for i in range(4))
    layers = (layer(num_heads=4, alibi_slopes=slopes), layer(group=1, cache=1, num_heads=8, sinks=sinks))
    geometry = Geometry((CACHE, LARGE), layers)
    pools = [Pool("a:1", 3 << 20), Pool("b:1", 1 << 20)]
    partition = divide("head", pools, geometry, lambda _, part: part.block_bytes(), 1000)
    assert [share.heads for share in partition.shares] == [[1, 3], [1, 1]]
    first, second = (share.geometry.layers for share in partition.shares)
    assert [spec.num_heads for spec in (*first, *second)] == [2, 6, 2, 2]
    assert (first[0].alibi_slopes, second[0].alibi_slopes) == (slopes[:2], slopes[2:])
    assert (first[1].sinks, second[1].sinks) == (sinks[:6], sinks[6:])
    three = [Pool(f"{name}:1", 64 << 20) for name in "abc"]
    with pytest.raises(
        ConfigError, match=re.escape("the model has 2 for 3 workers: choose --lamina-partition sequence")
    ):
        divide("head", three, geometry, lambda _, part: part.block_bytes(), 1000)
    assert divide("auto", three, geometry, lambda _, part: part.block_bytes(), 10).kind == "request"


def test_every_worker_holds_a_latent_cache() -> None:
    """By head its query heads are divided, evenly, and nothing is gained in room: auto divides it by blocks."""
    geometry = Geometry.uniform(2, 32, 16, 1, 576, "bfloat16", (0.1, 0.1), latent_size=512)
    block = geometry.block_bytes()
    assert block == 2 * 32 * 576 * 2
    pools = [Pool("a:1", 30 * block), Pool("b:1", 10 * block), Pool("c:1", 20 * block)]
    partition = divide("head", pools, geometry, lambda _, part: part.block_bytes(), 100)
    assert [share.heads for share in partition.shares] == [[6], [5], [5]]
    assert [share.geometry.caches for share in partition.shares] == [geometry.caches] * 3
    assert partition.num_blocks == 10
    equal = [Pool("a:1", 40 * block), Pool("b:1", 40 * block)]
    chosen = divide("auto", equal, geometry, lambda _, part: part.block_bytes(), 100)
    assert (chosen.kind, chosen.num_blocks) == ("request", 80)
    with pytest.raises(
        ConfigError, match="needs a query head for every attention worker; the model has 1 for 2"
    ):
        divide("head", equal, geometry.with_heads([0], [1]), lambda _, part: part.block_bytes(), 100)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"num_kv_heads": 2}, "num_kv_heads of a latent cache = 2"), ({"head_size_v": 80}, "head_size_v = 80")],
)
def test_a_latent_cache_has_one_head(changed: dict[str, int], message: str) -> None:
    cache = msgspec.structs.replace(CacheSpec(32, 1, 64, 64, "float32", latent=True), **changed)
    with pytest.raises(ValueError, match=message):
        Geometry((cache,), (layer(),))
