"""Attention in float64 NumPy, one request at a time: the judge of every kernel variant."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rule:
    """What a layer does with scores: the fields of `ScoreRule`."""

    scale: float
    soft_cap: float = 0.0
    window: int = 0
    chunk: int = 0
    sinks: tuple[float, ...] = ()
    alibi_slopes: tuple[float, ...] = ()

    def sees(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Say which queries see which keys, ``[queries, keys]`` bool, by their positions."""
        seen = np.ones((len(queries), len(keys)), bool)
        if self.window:
            seen &= keys > queries[:, None] - self.window
        if self.chunk:
            seen &= keys >= queries[:, None] // self.chunk * self.chunk
        return seen


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


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    rule: Rule,
    queries: np.ndarray,
    keys: np.ndarray,
    complete: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention of one request.

    Parameters
    ----------
    q
        ``[query_len, num_heads, head_size]``, float64.
    k, v
        ``[kv_len, num_kv_heads, head_size]`` and ``[kv_len, num_kv_heads, head_size_v]``, float64.
    rule
        What happens to scores.
    queries, keys
        ``[query_len]`` and ``[kv_len]``: positions.
    complete
        ``[query_len]``, bool: whether a query token counts the sinks.

    Returns
    -------
    out, lse
        ``[query_len, num_heads, head_size_v]`` and ``[query_len, num_heads]``, float64. Where nothing is seen: 0, and
        -inf or the sink.
    """
    query_len, num_heads, head_size = q.shape
    kv_len, num_kv_heads, _ = k.shape
    grouped = q.reshape(query_len, num_kv_heads, num_heads // num_kv_heads, head_size)
    scores = np.einsum("qhgd,khd->qhgk", grouped, k).reshape(query_len, num_heads, kv_len) * rule.scale
    if rule.soft_cap:
        scores = rule.soft_cap * np.tanh(scores / rule.soft_cap)
    if rule.alibi_slopes:
        distance = keys[None, :] - queries[:, None]
        scores += np.array(rule.alibi_slopes)[:, None] * distance[:, None, :]
    scores = np.where(rule.sees(queries, keys)[:, None, :], scores, -np.inf)
    sinks = np.where(complete[:, None], np.array(rule.sinks or -np.inf), -np.inf)
    scores = np.concatenate([scores, np.broadcast_to(sinks, scores.shape[:2])[..., None]], axis=-1)
    peak = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(peak == -np.inf, 0, peak))
    total = weights.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = peak[..., 0] + np.log(total)
    weights = weights[..., :-1] / np.where(total == 0, 1, total)[..., None]
    weights = weights.reshape(*grouped.shape[:3], kv_len)
    return np.einsum("qhgk,khd->qhgd", weights, v).reshape(query_len, num_heads, v.shape[-1]), lse
