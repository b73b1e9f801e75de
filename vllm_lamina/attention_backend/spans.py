"""Spans that see each other whole, such as an image's tokens: what each token attends of those that come after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_lamina.attention_backend.host_layers import merge_by_lse
from vllm_lamina.device.base import Chunks, LayerShape, LocalAttention

TILE = 256
"""Query tokens that are attended at a time."""

Spans = Sequence[tuple[int, int]]
"""Rows [first, end) of prefill chunks, counted from the first chunk's first."""


def with_spans(attend: LocalAttention, spans: Spans, shape: LayerShape) -> LocalAttention:
    """A layer's causal attention, in which a token of a span also attends the span's later tokens.

    What a token sees before it, within a window or a chunk, stays as it is: the two sets of tokens are disjoint, and
    merged by LSE. Windows do not bound what is ahead, in vLLM's backends as in transformers.
    """

    def attend_with_spans(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend(q, k, v, chunks)
        for first, end in spans:
            for start in range(first, end - 1, TILE):  # the last one sees nothing ahead
                rows, ahead = slice(start, min(start + TILE, end - 1)), slice(start + 1, end)
                ahead_out, ahead_lse = _attend_ahead(q[rows], k[ahead], v[ahead], shape)
                out[rows] = merge_by_lse(out[rows], lse[rows], ahead_out, ahead_lse)
                lse[rows] = torch.logaddexp(lse[rows], ahead_lse)
        return out, lse

    return attend_with_spans


def _attend_ahead(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: LayerShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE, float32, where the query of row i attends the keys from row i on, which begin a token later."""
    kv_heads, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    ahead = torch.arange(len(k), device=q.device) - torch.arange(len(q), device=q.device)[:, None]
    scores = torch.einsum("nkgd,mkd->kgnm", q.float().unflatten(1, (kv_heads, group)), k.float())
    scores *= shape.scale
    if shape.soft_cap:
        scores.div_(shape.soft_cap).tanh_().mul_(shape.soft_cap)
    if shape.alibi_slopes is not None:
        scores += shape.alibi_slopes.view(kv_heads, group, 1, 1) * (ahead + 1)
    scores.masked_fill_(ahead < 0, -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.einsum("kgnm,mkd->nkgd", scores.sub_(lse.unsqueeze(-1)).exp_(), v.float())
    return out.flatten(1, 2), lse.permute(2, 0, 1).flatten(1)
