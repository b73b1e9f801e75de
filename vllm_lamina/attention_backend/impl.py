"""One layer's attention, as vLLM calls it: the exchange attends it."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.attention_backend.metadata import LaminaMetadata
from vllm_lamina.attention_backend.spans import with_spans
from vllm_lamina.device.base import LayerShape
from vllm_lamina.support import LayerOptions, check_layer, refuse_fields

NO_LOOKBACK = ("chunk_lookback", -1)
"""An option of a model that knows chunks which look back, of its layers without chunks."""


class LaminaAttentionImpl(AttentionImpl[LaminaMetadata]):
    """Causal attention of a decoder layer, but for spans of multimodal inputs that see each other whole.

    Attributes
    ----------
    shape
        What the layer does with q, k and v.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **other: object,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self._stores = kv_sharing_target_layer_name is None
        self._options = LayerOptions(
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=head_size,
            attn_type=attn_type,
            kv_cache_dtype=kv_cache_dtype,
            other=tuple(
                name for name, value in other.items() if value is not None and (name, value) != NO_LOOKBACK
            ),
        )
        check_layer(self._options)
        self.shape = LayerShape(
            num_heads,
            self.num_kv_heads,
            head_size,
            head_size,
            self.scale,
            torch.get_default_dtype(),  # the model's, while vLLM makes its layers
            window=max(0, sliding_window or 0),
            soft_cap=logits_soft_cap or 0.0,
            sinks=sinks,
            alibi_slopes=None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32),
        )
        self.attend_locally = Exchange.current().device.local_attention(self.shape)

    def complete(self, head_size_v: int, chunk: int) -> None:
        """What vLLM tells the layer and not its implementation, see `LayerShape`. Under vLLM's configuration.

        Raises
        ------
        UnsupportedError
            Values of such a size are not supported.
        """
        check_layer(replace(self._options, head_size=head_size_v))
        self.shape = replace(self.shape, head_size_v=head_size_v, chunk=chunk)
        self.attend_locally = Exchange.current().device.local_attention(self.shape)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: LaminaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend one layer of one step.

        Parameters
        ----------
        query
            [tokens, num_heads, head_size], the model's dtype; tokens may be padded beyond those of the step.
        key, value
            [tokens, num_kv_heads, head_size or head_size_v], the model's dtype; None where the layer attends what
            another stores.
        kv_cache
            Empty: the KV blocks are on the attention worker.
        attn_metadata
            The step; None, or without one, when vLLM profiles or warms up, where nothing is attended. Where vLLM
            captures, what is enqueued attends the steps in which it is replayed.
        output
            [tokens, num_heads, head_size_v], written in place; zeros where nothing is attended. Anything where an
            attention worker was lost: the step is thrown away.

        Raises
        ------
        UnsupportedError
            The model has a layer attend what this very layer has stored: the attention worker would store it again.
        """
        if key is None and self._stores:
            refuse_fields({"key": key}, "an attention layer of its own KV")
        if attn_metadata is None or (attn_metadata.step is None and not attn_metadata.captures):
            return output.zero_()
        layers, lane = attn_metadata.exchange.layers, attn_metadata.lane
        index = attn_metadata.exchange.layer_index(layer)
        step = attn_metadata.step
        if step is None:
            layers.capture(lane, index, query, key, value, output)
            return output
        attend_locally, spans = self.attend_locally, attn_metadata.mm_prefix_range
        if spans:
            attend_locally = with_spans(attend_locally, spans, self.shape)
        rows = slice(step.num_tokens)
        layers.attend(
            lane,
            step,
            index,
            query[rows],
            key[rows] if key is not None else None,
            value[rows] if value is not None else None,
            output[rows],
            attend_locally,
        )
        return output
