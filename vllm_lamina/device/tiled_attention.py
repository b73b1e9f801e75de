"""Prefill chunks on a CPU where scores are masked, biased or capped: tile by tile of queries, over what each sees."""

from __future__ import annotations

import torch

from vllm_lamina.device.base import Chunks, LayerShape

TILE = 128
"""Query tokens of a tile: with a window of w tokens, n tokens cost n * (w + TILE) scores for each head."""


def tiled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks, shape: LayerShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `LocalAttention`; q, k and v have one head size, and neither chunk edges nor sinks are looked at."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    longest_context = min(shape.window or chunks.longest, chunks.longest) - 1
    # The score that is added for each key of a tile and of what lies before it; how far a key is behind its query.
    distance = torch.arange(-longest_context, TILE) - torch.arange(TILE)[:, None]
    is_seen = distance <= 0
    if shape.window:
        is_seen &= distance > -shape.window
    bias = torch.where(is_seen, 0.0, -torch.inf)
    slopes = None
    if shape.alibi_slopes is not None:
        slopes = shape.alibi_slopes.view(kv_heads, group, 1, 1)
    if shape.soft_cap:
        q, k, v = q.float(), k.float(), v.float()
    first = 0
    for length in chunks.lengths:
        for start in range(0, length, TILE):
            end = min(start + TILE, length)
            context = min(start, longest_context)
            rows = slice(first + start, first + end)
            keys = slice(rows.start - context, rows.stop)
            tile = slice(end - start), slice(longest_context - context, longest_context + end - start)
            added = bias[tile] if slopes is None else bias[tile] + slopes * distance[tile]
            # A group of query heads shares its KV head's rows: as a batch of KV heads nothing is copied.
            queries = q[rows].unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
            tile_k, tile_v = (t[keys].transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for t in (k, v))
            if shape.soft_cap:
                part, part_lse = _capped(queries, tile_k, tile_v, added, shape.scale, shape.soft_cap)
            else:
                part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    queries, tile_k, tile_v, attn_mask=added, scale=shape.scale
                )
            out[rows] = part.permute(2, 0, 1, 3).flatten(1, 2)
            lse[rows] = part_lse.permute(2, 0, 1).flatten(1)
        first += length
    return out, lse


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor, scale: float, soft_cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as the operator in float32, with capped scores, which no operator with an LSE has."""
    # A matrix product would copy what a group shares: its members' queries are rows of one matrix instead.
    scores = (q.flatten(1, 2) @ k[:, 0].transpose(1, 2)).unflatten(1, q.shape[1:3])
    scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap).add_(added)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.unsqueeze(-1)).exp_()
    return (weights.flatten(1, 2) @ v[:, 0]).unflatten(1, q.shape[1:3]), lse
