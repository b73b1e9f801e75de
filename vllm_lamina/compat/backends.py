"""Putting an attention backend in the place of one that vLLM or a model selects, and taking it out again."""

from __future__ import annotations

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

NAMED_BY_MODELS = ("FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV")
"""A model whose v are of another size than k takes one of these by itself, whatever vLLM selects."""


def override_attention_backend(name: str, class_path: str) -> None:
    """Let ``AttentionBackendEnum[name]`` mean ``class_path`` in this process."""
    register_backend(AttentionBackendEnum[name], class_path)
    # vLLM remembers which class it selected: an engine may have run in this process before.
    selector._cached_get_attn_backend.cache_clear()


def restore_attention_backend(name: str) -> None:
    """Let ``AttentionBackendEnum[name]`` mean vLLM's own class again."""
    AttentionBackendEnum[name].clear_override()
    selector._cached_get_attn_backend.cache_clear()
