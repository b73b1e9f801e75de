"""The model worker's device is this host's CPU: tensors are shared with the exchange as they are."""

from __future__ import annotations

from functools import partial

import torch

from vllm_lamina.device.base import Chunks, Device, LayerShape, LocalAttention
from vllm_lamina.device.kernel_limits import around
from vllm_lamina.device.tiled_attention import tiled_attention


class CpuDevice(Device):
    """Nothing to copy; the local attention is PyTorch's flash kernel, which returns the LSE."""

    device_type = "cpu"
    worker_cls = "vllm_lamina.worker.model_worker.worker.LaminaCPUWorker"
    backend_name = "CPU_ATTN"
    backend_is_asked_for = False

    def local_attention(self, shape: LayerShape) -> LocalAttention:
        causal = partial(causal_attention, scale=shape.scale)
        if shape.soft_cap or shape.alibi_slopes is not None:
            return around(partial(tiled_attention, shape=shape), shape)
        if not shape.window:
            return around(causal, shape)

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if chunks.longest <= shape.window:
                return causal(q, k, v, chunks)
            return tiled_attention(q, k, v, chunks, shape)

        return around(attend, shape)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `LocalAttention`."""
    num_rows, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    out = torch.empty_like(q)
    lse = torch.empty(num_rows, num_heads, dtype=torch.float32)
    first = 0
    for length in chunks.lengths:
        rows = slice(first, first + length)
        first += length
        keys, values = _batch(k[rows]), _batch(v[rows])
        # The op wants as many KV heads as query heads. One call per member of the group needs no copy of k and v.
        for member in range(group):
            heads = slice(member, None, group)
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _batch(q[rows, heads]), keys, values, 0.0, True, scale=scale
            )
            out[rows, heads] = part[0].transpose(0, 1)
            lse[rows, heads] = part_lse[0].transpose(0, 1)
    return out, lse


def _batch(tensor: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_size] as the op's [1, heads, tokens, head_size]."""
    return tensor.transpose(0, 1).unsqueeze(0)
