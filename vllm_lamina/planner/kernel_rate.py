"""Measures how fast this host's attention kernel reads a KV cache."""

from __future__ import annotations

import time

import numpy as np

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 8, 2, 64, 128
POOL_BYTES = 384 << 20


def kernel_read_rate(batch: int, context: int, cpus: list[int], seconds: float = 1.0) -> float:
    """Return bytes of KV that the kernel reads per second, bfloat16, decoding.

    Parameters
    ----------
    batch, context
        Sequences, and cached tokens of each; layers are read in turn, 384 MiB in all, as a model does.
    cpus
        CPU of each thread.
    """
    from vllm_lamina.kernels import Arena, AttentionKernel, ThreadPool

    kernel = AttentionKernel("bfloat16", HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE)
    threads = ThreadPool(len(cpus), cpus)
    blocks = -(-context // BLOCK_SIZE)
    layer_bytes = batch * blocks * kernel.block_bytes
    count = max(2, POOL_BYTES // layer_bytes)
    memory = Arena(count * layer_bytes).array()
    layers = [memory[i * layer_bytes : (i + 1) * layer_bytes] for i in range(count)]
    tokens = np.full((batch * context, KV_HEADS, HEAD_SIZE), 0x3C00, np.uint16)  # 0.0078125 in bfloat16
    slots = np.concatenate([np.arange(context) + row * blocks * BLOCK_SIZE for row in range(batch)])
    for layer in layers:
        kernel.append(layer, tokens, tokens, slots.astype(np.int64), threads)
    query = np.full((batch, HEADS, HEAD_SIZE), 0x3C00, np.uint16)
    starts = np.arange(batch + 1, dtype=np.int32)
    lengths = np.full(batch, context, np.int32)
    tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 2 * count:
        layer = layers[len(times) % count]
        start = time.perf_counter()
        kernel.attend(layer, query, starts, lengths, tables, HEAD_SIZE**-0.5, threads)
        times.append(time.perf_counter() - start)
    read = batch * context * 2 * KV_HEADS * HEAD_SIZE * 2
    return float(read / np.quantile(times[count:], 0.25))
