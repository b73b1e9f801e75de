"""The model worker's device is a CUDA GPU. Written against vLLM 0.32 and 0.33, not run on a GPU yet.

q, k, v and the output cross through pinned host buffers, copied on the current stream.
"""

from __future__ import annotations

import torch

from vllm_lamina.compat import flash_attention
from vllm_lamina.device.base import Chunks, Device, LocalAttention
from vllm_lamina.device.efficient_attention import efficient_attention


class CudaDevice(Device):
    """Pinned staging buffers; the local attention is vLLM's FlashAttention, or PyTorch's where that does not do."""

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

    def local_attention(self, head_size: int, scale: float) -> LocalAttention:
        version = flash_attention.version_for(head_size)

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if version is None or not flash_attention.takes(q.dtype, head_size):
                return efficient_attention(q, k, v, chunks, scale)
            starts = chunks.starts_on(q.device)
            return flash_attention.attend(q, k, v, starts, chunks.longest, scale, version)

        return attend
