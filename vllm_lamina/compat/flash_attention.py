"""vLLM's FlashAttention, of the version that the GPU has, over prefill chunks. Not run on a GPU yet."""

from __future__ import annotations

import torch


def version_for(head_size: int, alibi: bool = False, soft_cap: bool = False) -> int | None:
    """The version that vLLM would take for such a layer: 3 on Hopper, say, and 4 there for head sizes above 256; None
    where it has none for the GPU.

    To be asked under vLLM's configuration, which may name one (``--attention-config.flash_attn_version``).
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version: int | None = get_flash_attn_version(
        requires_alibi=alibi, head_size=head_size, requires_softcap=soft_cap
    )
    return version


def takes(version: int, dtype: torch.dtype, head_size: int) -> bool:
    """Whether a version that `version_for` chose takes this: what vLLM's own FlashAttention backend says."""
    largest = 512 if version == 4 else 256
    return dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= largest


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
    version: int,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend all chunks in one call.

    Parameters
    ----------
    q
        [rows, num_heads, head_size], on the GPU.
    k, v
        [rows, num_kv_heads, head_size], the dtype of q, on the GPU.
    starts
        [chunks + 1], int32, on the GPU: the first row of each chunk, and how many rows there are.
    longest
        Rows of the longest chunk.
    scale
        Factor of q . k before the softmax.
    version
        See `version_for`.
    window, soft_cap, alibi_slopes
        See `LayerShape`; the slopes on the GPU.

    Returns
    -------
    tuple
        See `LocalAttention`.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=[window - 1, 0] if window else [-1, -1],
        softcap=soft_cap,
        alibi_slopes=alibi_slopes,
        return_softmax_lse=True,
        fa_version=version,
    )
    return out, lse.transpose(0, 1)  # from [num_heads, rows]
