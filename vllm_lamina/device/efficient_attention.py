"""PyTorch's memory-efficient attention over prefill chunks on a GPU, for what FlashAttention does not take, as float32.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_lamina.device.base import Chunks, LayerShape

_CAUSAL = 1
"""The operator's name for a mask from the top left: query i of a chunk attends its keys 0 to i."""

_operator: Any = torch.ops.aten._efficient_attention_forward


def efficient_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks, shape: LayerShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `LocalAttention`; one call for all chunks. Of the shape it takes the scale and the window.

    Of the operator under `scaled_dot_product_attention` this form is the one that takes variable lengths, as PyTorch's
    nested tensors use it. Heads lie 16 values apart or multiples of it, so it finds all rows aligned.
    """
    starts = chunks.starts_on(q.device)
    group = q.shape[1] // k.shape[1]
    if group > 1:  # it wants as many KV heads as query heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out, lse, *_ = _operator(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        None,
        starts,
        starts,
        chunks.longest,
        chunks.longest,
        0.0,
        _CAUSAL,
        compute_log_sumexp=True,
        scale=shape.scale,
        window_size=shape.window or None,
    )
    # [chunks, num_heads, the longest, rounded up to a multiple of 32]
    rows = [part[:, :length] for part, length in zip(lse, chunks.lengths, strict=True)]
    return out[0], torch.cat(rows, dim=1).transpose(0, 1)
