"""The attention backend that vLLM's model runner calls: it sends the attention operator to the attention workers."""

from vllm_lamina.attention_backend.backend import LaminaAttentionBackend
from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.attention_backend.latent import LaminaLatentBackend

__all__ = ["Exchange", "LaminaAttentionBackend", "LaminaLatentBackend"]
