"""The model worker's device is a CUDA GPU. Written against vLLM 0.32 and 0.33, not run on a GPU yet."""

from __future__ import annotations

from functools import partial

import torch

from vllm_lamina.compat import flash_attention
from vllm_lamina.device.base import Chunks, Device, LayerShape, LocalAttention, Streams
from vllm_lamina.device.efficient_attention import efficient_attention
from vllm_lamina.device.kernel_limits import around
from vllm_lamina.errors import UnsupportedError
from vllm_lamina.support import WITHOUT_LAMINA


class CudaDevice(Device):
    """Streams exchange the layers; chunks attend by vLLM's FlashAttention, or by PyTorch's operator."""

    device_type = "cuda"
    worker_cls = "vllm_lamina.worker.model_worker.worker.LaminaCUDAWorker"
    backend_name = "CUSTOM"
    backend_is_asked_for = True

    def streams(self) -> Streams:
        from vllm_lamina.device.cuda_streams import CudaStreams

        return CudaStreams()

    def local_attention(self, shape: LayerShape) -> LocalAttention:
        size = max(shape.head_size, shape.head_size_v)
        version = flash_attention.version_for(size, shape.alibi_slopes is not None, bool(shape.soft_cap))
        if version is None or not flash_attention.takes(version, shape.dtype, size):
            _check_efficient(shape)
            return around(partial(efficient_attention, shape=shape), shape)

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks
        ) -> tuple[torch.Tensor, torch.Tensor]:
            what = (q, k, v, chunks.starts_on(q.device), chunks.longest)
            how = (shape.scale, version, shape.window, shape.soft_cap, shape.alibi_slopes)
            return flash_attention.attend(*what, *how)

        return around(attend, shape)


def _check_efficient(shape: LayerShape) -> None:
    said = {"attention logit soft-capping": shape.soft_cap, "ALiBi": shape.alibi_slopes is not None}
    if features := [name for name, value in said.items() if value]:
        dtype = str(shape.dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"Lamina does not support {' and '.join(features)} of a layer with head size {shape.head_size} in {dtype} "
            f"on this GPU, where FlashAttention does not take it: use --dtype bfloat16 with head sizes up to 256, or "
            f"{WITHOUT_LAMINA}."
        )
