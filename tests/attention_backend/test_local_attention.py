"""The model worker's half of a prefill chunk, and its merge with the attention worker's, against float64."""

import math

import pytest
import torch

from vllm_lamina.attention_backend.host_layers import merge_by_lse
from vllm_lamina.device.base import Chunks
from vllm_lamina.device.cpu import CpuDevice, causal_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the output, whose values are about 1: a few units in the last place of the dtype."""


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, first_key: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64; query i attends the keys up to ``first_key + i``."""
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    visible = torch.arange(k.shape[0])[None, :] <= first_key + torch.arange(q.shape[0])[:, None]
    scores = scores.masked_fill(~visible, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1).transpose(0, 1)


def qkv(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slices of one fused projection, as models hand them over: the rows are strided."""
    torch.manual_seed(num_tokens * 1000 + head_size)
    fused = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_size).to(dtype)
    q, k, v = fused.split([n * head_size for n in (num_heads, num_kv_heads, num_kv_heads)], dim=-1)
    return tuple(t.view(num_tokens, -1, head_size) for t in (q, k, v))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_size", [32, 80, 128, 256])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300])
def test_causal_attention(
    num_tokens: int, head_size: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    q, k, v = qkv(num_tokens, num_heads, num_kv_heads, head_size, dtype)
    scale = head_size**-0.5
    out, lse = CpuDevice().local_attention(head_size, scale)(q, k, v, Chunks([num_tokens]))
    expected_out, expected_lse = reference(q, k, v, scale)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected_out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    # For 16-bit inputs PyTorch uses a coarser exponential; a weight's error stays far below the dtype's own.
    lse_tolerance = 1e-5 if dtype == torch.float32 else 2e-4
    torch.testing.assert_close(lse.double(), expected_lse, atol=lse_tolerance, rtol=lse_tolerance)


def test_chunks_attend_within_themselves() -> None:
    lengths = [5, 1, 33]
    q, k, v = qkv(sum(lengths), 6, 2, 64, torch.float32)
    out, lse = causal_attention(q, k, v, Chunks(lengths), 0.125)
    expected = [reference(*rows, 0.125) for rows in zip(*(t.split(lengths) for t in (q, k, v)), strict=True)]
    torch.testing.assert_close(out.double(), torch.cat([e[0] for e in expected]), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), torch.cat([e[1] for e in expected]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context_len", [1, 40])
def test_merging_with_the_context_gives_the_full_softmax(context_len: int) -> None:
    q, k, v = qkv(context_len + 24, 4, 2, 64, torch.float32)
    chunk = slice(context_len, None)
    local_out, local_lse = causal_attention(q[chunk], k[chunk], v[chunk], Chunks([24]), 0.125)
    # Every query of the chunk sees the whole context.
    context_out, context_lse = reference(
        q[chunk], k[:context_len], v[:context_len], 0.125, first_key=context_len
    )
    merged = merge_by_lse(local_out, local_lse, context_out.float(), context_lse.float())
    expected, _ = reference(q[chunk], k, v, 0.125, first_key=context_len)
    torch.testing.assert_close(merged.double(), expected, atol=2e-6, rtol=2e-6)


def test_merging_with_nothing_changes_nothing() -> None:
    out, lse = torch.randn(3, 2, 8), torch.randn(3, 2)
    nothing = torch.zeros(3, 2, 8), torch.full((3, 2), -math.inf)
    assert torch.equal(merge_by_lse(out, lse, *nothing), out)
