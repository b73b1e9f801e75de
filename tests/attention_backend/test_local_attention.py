"""The model worker's half of a prefill chunk, and its merge with the attention worker's, against float64."""

import dataclasses
import math
from itertools import product
from typing import Any

import pytest
import torch
from attention_cases import SINKS, SLOPES, plain, qkv, reference
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_lamina.attention_backend.host_layers import merge_by_lse
from vllm_lamina.device.base import Chunks
from vllm_lamina.device.cpu import CpuDevice, causal_attention
from vllm_lamina.device.tiled_attention import TILE

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the output, whose values are about 1: a few units in the last place of the dtype."""

# For 16-bit inputs PyTorch uses a coarser exponential; a weight's error stays far below the dtype's own.
LSE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-4, torch.float16: 2e-4}


def assert_equal(
    found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> None:
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    for mine, right, tolerance in zip(found, expected, (TOLERANCE, LSE_TOLERANCE), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=tolerance[dtype], rtol=tolerance[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_size", [32, 80, 256, 512])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300])
def test_causal_attention(
    num_tokens: int, head_size: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    q, k, v = qkv(num_tokens, num_heads, num_kv_heads, head_size, dtype)
    shape = plain(num_heads, num_kv_heads, head_size, dtype)
    found = CpuDevice().local_attention(shape)(q, k, v, Chunks([num_tokens], [0]))
    assert_equal(found, reference(q, k, v, shape), dtype)


def test_chunks_attend_within_themselves() -> None:
    lengths = [5, 1, 33]
    q, k, v = qkv(sum(lengths), 6, 2, 64, torch.float32)
    shape = plain(6, 2, 64, torch.float32)
    found = causal_attention(q, k, v, Chunks(lengths, [0, 7, 0]), shape.scale)
    parts = [reference(*rows, shape) for rows in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)]
    assert_equal(found, (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])), torch.float32)


LENGTHS = [1, 1 + 2 * TILE, 37]
POSITIONS = [0, 70, 31]

RULES = [
    {"window": window, "chunk": chunk, "soft_cap": soft_cap, "sinks": sinks, "alibi_slopes": slopes}
    for window, chunk, soft_cap, sinks, slopes in product(
        (0, 1, 40, 1000), (0, 64), (0.0, 1.5), (None, SINKS), (None, SLOPES)
    )
]
"""All that a layer may do with scores, with six query heads."""


def named(rule: dict[str, Any]) -> str:
    return " ".join(
        name if isinstance(value, torch.Tensor) else f"{name}={value}"
        for name, value in rule.items()
        if value is not None
    )


def is_quick(rule: dict[str, Any], dtype: torch.dtype) -> bool:
    """All in float32; of the other dtypes one case for the operator and one for what is capped."""
    return dtype == torch.float32 or (
        rule["window"] == 40
        and rule["chunk"] == 0
        and all((rule[name] is None) == (rule["soft_cap"] > 0) for name in ("sinks", "alibi_slopes"))
    )


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        pytest.param(
            rule, dtype, id=f"{named(rule)} {dtype}", marks=[] if is_quick(rule, dtype) else pytest.mark.slow
        )
        for rule, dtype in product(RULES, TOLERANCE)
    ],
)
def test_all_that_a_layer_may_do_with_scores(rule: dict[str, Any], dtype: torch.dtype) -> None:
    for head_size, head_size_v in ((64, 64), (96, 64), (32, 80)):
        q, k, v = qkv(sum(LENGTHS), 6, 2, head_size, dtype, head_size_v)
        shape = plain(6, 2, head_size, dtype, head_size_v=head_size_v, **rule)
        found = CpuDevice().local_attention(shape)(q, k, v, Chunks(LENGTHS, POSITIONS))
        parts = [
            reference(*rows, shape, position=position)
            for *rows, position in zip(*(t.split(LENGTHS) for t in (q, k, v)), POSITIONS, strict=True)
        ]
        assert_equal(found, (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])), dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rule", [{"window": 600}, {"alibi_slopes": SLOPES}, {"soft_cap": 1.5}], ids=named)
def test_more_keys_than_a_block_of_the_operator(rule: dict[str, Any], dtype: torch.dtype) -> None:
    """PyTorch's has 512: of a tile's first and last there are rows that see nothing."""
    q, k, v = qkv(900, 6, 2, 32, dtype)
    shape = plain(6, 2, 32, dtype, **rule)
    found = CpuDevice().local_attention(shape)(q, k, v, Chunks([900], [0]))
    assert_equal(found, reference(q, k, v, shape), dtype)


def test_sinks_are_those_that_the_model_has_loaded() -> None:
    """vLLM makes a layer with a parameter that has no values yet; models have it in their own dtype."""
    sinks = torch.full((4,), math.nan, dtype=torch.bfloat16)
    q, k, v = qkv(20, 4, 2, 64, torch.float32)
    shape = plain(4, 2, 64, torch.float32, sinks=sinks)
    attend = CpuDevice().local_attention(shape)
    sinks.copy_(torch.tensor([1.0, -2.0, 0.5, 8.0]))
    assert_equal(attend(q, k, v, Chunks([20], [0])), reference(q, k, v, shape), torch.float32)


class Scores(TorchDispatchMode):
    """Counts those that the operator computes with a mask, of one head."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attn_mask" in (kwargs or {}):
            self.count += kwargs["attn_mask"].numel()
        return func(*args, **kwargs or {})


def test_a_window_costs_its_width() -> None:
    num_tokens, window = 8 * TILE, 50
    q, k, v = qkv(num_tokens, 2, 1, 32, torch.float32)
    shape = plain(2, 1, 32, torch.float32, window=window)
    with Scores() as scores:
        CpuDevice().local_attention(shape)(q, k, v, Chunks([num_tokens], [0]))
    assert num_tokens * window < scores.count <= num_tokens * (window + TILE)


def test_chunks_are_cut_where_positions_reach_a_multiple() -> None:
    chunks = Chunks([3, 1, 9, 4], [0, 7, 6, 8])
    cut = chunks.cut(4)
    assert cut.lengths == [3, 1, 2, 4, 3, 4]
    assert cut.positions.tolist() == [0, 7, 6, 8, 12, 8]
    assert cut.starts.tolist() == [0, 3, 4, 6, 10, 13, 17]
    assert cut.starts.dtype == cut.positions.dtype == torch.zeros(0, dtype=torch.int32).numpy().dtype
    assert chunks.cut(4) is cut


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"window": 12, "sinks": SINKS},
        {"window": 100, "alibi_slopes": SLOPES, "soft_cap": 1.5},
        {"chunk": 16},
        {"chunk": 64, "sinks": SINKS},
    ],
    ids=named,
)
@pytest.mark.parametrize("context_len", [1, 40])
def test_merging_with_the_context_gives_the_full_softmax(context_len: int, rule: dict[str, Any]) -> None:
    """Of the context some queries see nothing."""
    q, k, v = qkv(context_len + 24, 6, 2, 64, torch.float32)
    shape = plain(6, 2, 64, torch.float32, **rule)
    rows = slice(context_len, None)
    local_out, local_lse = CpuDevice().local_attention(shape)(
        q[rows], k[rows], v[rows], Chunks([24], [context_len])
    )
    # Sinks are the local part's.
    context_out, context_lse = reference(
        q[rows], k[:context_len], v[:context_len], dataclasses.replace(shape, sinks=None), context_len
    )
    merged = merge_by_lse(local_out, local_lse, context_out.float(), context_lse.float())
    expected, _ = reference(q[rows], k, v, shape, context_len)
    torch.testing.assert_close(merged.double(), expected, atol=2e-6, rtol=2e-6)


def test_merging_with_nothing_changes_nothing() -> None:
    out, lse = torch.randn(3, 2, 8), torch.randn(3, 2)
    nothing = torch.zeros(3, 2, 8), torch.full((3, 2), -math.inf)
    assert torch.equal(merge_by_lse(out, lse, *nothing), out)
