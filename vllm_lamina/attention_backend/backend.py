"""vLLM's view of Lamina's attention: its name, what it supports, and the classes that do the work.

Where nothing is said here, vLLM's base class says no, which is true: tests/attention_backend/test_backend.py has all
that vLLM asks, with the answers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.attention_backend.impl import LaminaAttentionImpl
from vllm_lamina.attention_backend.metadata import LaminaMetadataBuilder
from vllm_lamina.kv_cache.geometry import DTYPES
from vllm_lamina.support import BLOCK_SIZE_MULTIPLE, HEAD_SIZES


class LaminaAttentionBackend(AttentionBackend):
    """Attention whose KV blocks lie on attention workers; the KV cache tensors that vLLM knows are empty."""

    # k and v go to the attention worker with q, so there is no separate call that stores them.
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [getattr(torch, name) for name in DTYPES]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", *DTYPES]

    @staticmethod
    def get_name() -> str:
        # vLLM looks the name up in its enumeration of backends.
        return Exchange.current().device.backend_name

    @staticmethod
    def get_impl_cls() -> type[LaminaAttentionImpl]:
        return LaminaAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LaminaMetadataBuilder]:
        return LaminaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        # Since Ampere; only GPUs are asked.
        return bool(capability.major >= 8)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        # Spans that see each other whole, see `spans`.
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # The attention workers are told the lengths that the scheduler says.
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)
