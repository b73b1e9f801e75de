"""The model worker's device is this host's CPU: tensors are shared with the exchange as they are."""

from __future__ import annotations

import torch

from vllm_lamina.device.base import Device


class CpuDevice(Device):
    """Nothing to copy; the local attention is PyTorch's flash kernel, which returns the LSE."""

    worker_cls = "vllm_lamina.worker.model_worker.worker.LaminaCPUWorker"
    backend_name = "CPU_ATTN"
    backend_is_asked_for = False

    def rows_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor[0].is_contiguous() else tensor.contiguous()

    def host_output(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def put_output(self, host: torch.Tensor, output: torch.Tensor) -> None:
        return None

    def causal_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_heads, _ = q.shape
        group = num_heads // k.shape[1]
        out = torch.empty_like(q)
        lse = torch.empty(num_tokens, num_heads, dtype=torch.float32)
        keys, values = _batch(k), _batch(v)
        # The op wants as many KV heads as query heads. One call per member of the group needs no copy of k and v.
        for member in range(group):
            heads = slice(member, None, group)
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _batch(q[:, heads]), keys, values, 0.0, True, scale=scale
            )
            out[:, heads] = part[0].transpose(0, 1)
            lse[:, heads] = part_lse[0].transpose(0, 1)
        return out, lse


def _batch(tensor: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_size] as the op's [1, heads, tokens, head_size]."""
    return tensor.transpose(0, 1).unsqueeze(0)
