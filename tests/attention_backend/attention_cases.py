"""Layers, their q, k and v, and their attention in float64."""

from __future__ import annotations

import math
from typing import Any

import torch

from vllm_lamina.device.base import LayerShape

# Of six query heads.
SINKS = torch.tensor([0.5, -3.0, 2.0, 4.0, 0.0, 1.0])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.01, 0.002, 1.0])


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shape: LayerShape,
    first_query: int = 0,
    position: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64.

    Query i is of the token that key ``first_query + i`` is of, or would be; key 0 is of the token at ``position``.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * shape.scale
    if shape.soft_cap:
        scores = shape.soft_cap * (scores / shape.soft_cap).tanh()
    key = position + torch.arange(k.shape[0])[None, :]
    query = position + first_query + torch.arange(q.shape[0])[:, None]
    if shape.alibi_slopes is not None:
        scores += shape.alibi_slopes.double()[:, None, None] * (key - query)
    is_seen = key <= query
    if shape.window:
        is_seen &= key > query - shape.window
    if shape.chunk:
        is_seen &= key >= query // shape.chunk * shape.chunk
    scores = scores.masked_fill(~is_seen, -math.inf)
    lse = scores.logsumexp(-1)
    if shape.sinks is not None:
        lse = torch.logaddexp(lse, shape.sinks.double()[:, None])
    # A row that sees nothing has weights of zero.
    weights = (scores - lse.clamp_min(-1e300).unsqueeze(-1)).exp()
    return torch.einsum("hqk,khd->qhd", weights, values), lse.transpose(0, 1)


def qkv(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    head_size_v: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slices of one fused projection, as models hand them over: the rows are strided."""
    torch.manual_seed(num_tokens * 1000 + head_size)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    head_sizes = (head_size, head_size, head_size_v or head_size)
    widths = [n * size for n, size in zip(heads, head_sizes, strict=True)]
    parts = torch.randn(num_tokens, sum(widths)).to(dtype).split(widths, dim=-1)
    return tuple(t.view(num_tokens, -1, size) for t, size in zip(parts, head_sizes, strict=True))


def plain(num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, **more: Any) -> LayerShape:
    """A layer of full attention, but for ``more``."""
    arguments = {"head_size_v": head_size, "scale": head_size**-0.5, "dtype": dtype} | more
    return LayerShape(num_heads, num_kv_heads, head_size, **arguments)
