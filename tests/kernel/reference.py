"""Attention in float64 NumPy, one request at a time: the judge of every kernel variant."""

import numpy as np


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 values to a KV dtype as the kernel takes it (bfloat16: bits in uint16)."""
    if dtype != "bfloat16":
        return x.astype(dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """Widen a KV dtype as the kernel takes it to float64."""
    if dtype == "bfloat16":
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Full softmax attention without a mask.

    Parameters
    ----------
    q
        ``[query_len, num_heads, head_size]``, float64.
    k, v
        ``[kv_len, num_kv_heads, head_size]``, float64.
    scale
        Softmax scale.

    Returns
    -------
    out, lse
        ``[query_len, num_heads, head_size]`` and ``[query_len, num_heads]``, float64. Without KV: 0 and -inf.
    """
    query_len, num_heads, head_size = q.shape
    kv_len, num_kv_heads, _ = k.shape
    if kv_len == 0:
        return np.zeros_like(q), np.full((query_len, num_heads), -np.inf)
    grouped = q.reshape(query_len, num_kv_heads, num_heads // num_kv_heads, head_size)
    scores = scale * np.einsum("qhgd,khd->qhgk", grouped, k)
    peak = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("qhgk,khd->qhgd", weights / total, v)
    lse = peak[..., 0] + np.log(total[..., 0])
    return out.reshape(q.shape), lse.reshape(query_len, num_heads)
