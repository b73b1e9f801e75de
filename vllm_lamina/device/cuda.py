"""The model worker's device is a CUDA GPU. Written against vLLM 0.32's interfaces and NOT RUN yet: no GPU was at hand.

q, k, v and the output cross through pinned host buffers, copied on the current stream.
"""

from __future__ import annotations

import torch

from vllm_lamina.compat.flash_attention import flash_attention
from vllm_lamina.device.base import Device


class CudaDevice(Device):
    """Pinned staging buffers; the local attention is vLLM's FlashAttention."""

    worker_cls = "vllm_lamina.worker.model_worker.worker.LaminaCUDAWorker"
    backend_name = "CUSTOM"
    backend_is_asked_for = True

    def rows_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        # The exchange reads the buffer from the CPU: the copy must have ended.
        torch.cuda.current_stream().synchronize()
        return host

    def host_output(self, output: torch.Tensor) -> torch.Tensor:
        return torch.empty(output.shape, dtype=output.dtype, pin_memory=True)

    def put_output(self, host: torch.Tensor, output: torch.Tensor) -> None:
        output.copy_(host, non_blocking=True)

    def causal_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_attention(q, k, v, scale)
