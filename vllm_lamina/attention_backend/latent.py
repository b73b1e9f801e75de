"""Multi-head latent attention, as vLLM calls it: a latent row is kept of a token, on the attention workers.

Decodes, and what prefill chunks attend of their context, go there absorbed: all query heads attend the one latent row.
Within a chunk, where a token is attended by many, keys and values of all heads are expanded, which takes less
arithmetic. See the comment at the top of vLLM's ``mla_attention.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionLayer, MLAAttentionImpl

from vllm_lamina.attention_backend.backend import LaminaAttentionBackend
from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.attention_backend.metadata import LaminaMetadata
from vllm_lamina.compat.latent_attention import BACKENDS, absorb, expand, project
from vllm_lamina.device.base import LayerShape
from vllm_lamina.support import LATENT_SIZES, LayerOptions, check_layer


class LaminaLatentImpl(MLAAttentionImpl[LaminaMetadata]):
    """Causal latent attention of a decoder layer.

    Attributes
    ----------
    shape
        What the layer does with q, k and v within a prefill chunk.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        *,
        qk_head_dim: int,
        v_head_dim: int,
        kv_lora_rank: int,
        indexer: object | None = None,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int = 0,
        qk_rope_head_dim: int = 0,
        kv_b_proj: object = None,
        **other: object,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_lora_rank = kv_lora_rank
        self.kv_b_proj = kv_b_proj
        device = Exchange.current().device
        unserved = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap or None,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
        }
        check_layer(
            LayerOptions(
                device_type=device.device_type,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_size=head_size,
                attn_type=attn_type,
                kv_cache_dtype=kv_cache_dtype,
                other=tuple(name for name, value in (unserved | other).items() if value is not None),
                latent_size=kv_lora_rank,
                indexer=indexer,
            )
        )
        dtype = torch.get_default_dtype()  # the model's, while vLLM makes its layers
        self.shape = LayerShape(num_heads, num_heads, qk_head_dim, v_head_dim, self.scale, dtype)
        self.attend_locally = device.local_attention(self.shape)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        latent: torch.Tensor,
        rotary: torch.Tensor,
        attn_metadata: LaminaMetadata | None,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Attend one layer of one step.

        Parameters
        ----------
        query
            [tokens, num_heads, qk_head_dim]; tokens may be padded beyond those of the step.
        latent, rotary
            [tokens, kv_lora_rank] and [tokens, 1, qk_rope_head_dim].
        attn_metadata
            The step; None, or without one, when vLLM profiles or warms up, where nothing is attended.
        output
            [tokens, num_heads * v_head_dim], written in place; zeros where nothing is attended. Anything where an
            attention worker was lost: the step is thrown away.
        """
        if attn_metadata is None or attn_metadata.step is None:
            return output.zero_()
        step, exchange = attn_metadata.step, attn_metadata.exchange
        index = exchange.layer_index(layer)
        rows = slice(step.num_tokens)
        query, latent, rotary = query[rows], latent[rows], rotary[rows].flatten(1)
        absorbed = query.new_empty(step.num_tokens, self.num_heads, self.head_size)
        for attended in step.rows_of_workers(index):
            absorb(layer, query[attended], absorbed[attended])

        def attend_chunks() -> tuple[torch.Tensor, torch.Tensor]:
            chunks = slice(step.first_chunk_token, step.num_tokens)
            keys, values = expand(layer, latent[chunks], rotary[chunks])
            return self.attend_locally(query[chunks], keys, values, step.chunks)

        exchange.layers.attend_latent(
            attn_metadata.lane,
            step,
            index,
            absorbed,
            torch.cat((latent, rotary), dim=-1).unsqueeze(1),
            output[rows].view(step.num_tokens, self.num_heads, -1),
            attend_chunks,
            partial(project, layer),
        )
        return output

    def forward_mqa(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise AssertionError("the layer is handed over whole")  # see `compat.latent_attention.hand_over`


class LaminaLatentBackend(LaminaAttentionBackend):
    """The same backend for layers with a latent cache."""

    @staticmethod
    def get_name() -> str:
        return BACKENDS[0]

    @staticmethod
    def get_impl_cls() -> Any:
        return LaminaLatentImpl

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(LATENT_SIZES)

    @classmethod
    def is_mla(cls) -> bool:
        return True
