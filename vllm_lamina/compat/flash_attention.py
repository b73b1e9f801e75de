"""vLLM's FlashAttention, for the tokens of one prefill chunk on a GPU. NOT RUN yet."""

from __future__ import annotations

import torch


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Device.causal_attention`."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    num_tokens = q.shape[0]
    starts = torch.tensor([0, num_tokens], dtype=torch.int32, device=q.device)
    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=num_tokens,
        max_seqlen_k=num_tokens,
        softmax_scale=scale,
        causal=True,
        return_softmax_lse=True,
    )
    return out, lse.transpose(0, 1)
