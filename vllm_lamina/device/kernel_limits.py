"""What the kernels of no device do for the local attention, done around them: chunk edges, head sizes, sinks."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from vllm_lamina.device.base import Chunks, LayerShape, LocalAttention


def around(attend: LocalAttention, shape: LayerShape) -> LocalAttention:
    """A layer's attention by a kernel that wants q, k and v of one size and knows neither chunk edges nor sinks."""
    size, size_v, sinks = shape.head_size, shape.head_size_v, shape.sinks
    if size == size_v and sinks is None and not shape.chunk:
        return attend

    def attend_around(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if shape.chunk:
            chunks = chunks.cut(shape.chunk)
        if size < size_v:  # zeros change no score
            q, k = pad(q, (0, size_v - size)), pad(k, (0, size_v - size))
        elif size_v < size:
            v = pad(v, (0, size - size_v))
        out, lse = attend(q, k, v, chunks)
        out = out[..., :size_v]
        return (out, lse) if sinks is None else count_sinks(out, lse, sinks)

    return attend_around


def count_sinks(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """An attention's output and LSE with each head's sink in the denominator of its softmax.

    Parameters
    ----------
    out
        [rows, num_heads, head_size].
    lse
        [rows, num_heads], float32.
    sinks
        [num_heads], any floating dtype.
    """
    logits = sinks.float()
    weight = torch.sigmoid(lse - logits).unsqueeze(-1)
    return (out.float() * weight).to(out.dtype), torch.logaddexp(lse, logits)
