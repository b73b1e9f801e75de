"""The model worker's device is a CUDA GPU. Written against vLLM 0.32 and 0.33, not run on a GPU yet."""

from __future__ import annotations

import torch

from vllm_lamina.compat import flash_attention
from vllm_lamina.device.base import Chunks, Device, LocalAttention, Streams
from vllm_lamina.device.efficient_attention import efficient_attention


class CudaDevice(Device):
    """Streams exchange the layers; chunks attend by vLLM's FlashAttention, or by PyTorch's operator."""

    worker_cls = "vllm_lamina.worker.model_worker.worker.LaminaCUDAWorker"
    backend_name = "CUSTOM"
    backend_is_asked_for = True

    def streams(self) -> Streams:
        from vllm_lamina.device.cuda_streams import CudaStreams

        return CudaStreams()

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
