"""One layer's attention: decodes are answered by the attention worker, prefill chunks by both sides, merged by LSE."""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_lamina._native import ChannelError
from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.attention_backend.metadata import LaminaMetadata
from vllm_lamina.compat import forward_context
from vllm_lamina.support import LayerOptions, check_layer


class LaminaAttentionImpl(AttentionImpl[LaminaMetadata]):
    """Full causal attention of a decoder layer."""

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
        check_layer(
            LayerOptions(
                num_heads=num_heads,
                num_kv_heads=self.num_kv_heads,
                head_size=head_size,
                attn_type=attn_type,
                alibi_slopes=alibi_slopes,
                sliding_window=sliding_window,
                logits_soft_cap=logits_soft_cap,
                kv_sharing_target_layer_name=kv_sharing_target_layer_name,
                sinks=sinks,
                kv_cache_dtype=kv_cache_dtype,
                other=tuple(name for name, value in other.items() if value is not None),
            )
        )
        self.attend_locally = Exchange.current().device.local_attention(head_size, self.scale)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
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
            [tokens, num_kv_heads, head_size], the model's dtype.
        kv_cache
            Empty: the KV blocks are on the attention worker.
        attn_metadata
            The step; None, or without one, when vLLM profiles or warms up, where nothing is attended.
        output
            [tokens, num_heads, head_size], written in place; zeros where nothing is attended, and where an
            attention worker was lost, see `Exchange.fail_step`.
        """
        step = attn_metadata.step if attn_metadata is not None else None
        if attn_metadata is None or step is None:
            return output.zero_()
        exchange, lane = attn_metadata.exchange, attn_metadata.lane
        step.send_once(exchange.client, lane, exchange.timeout)
        num_tokens = step.num_tokens
        device = exchange.device
        q = device.rows_on_host(query[:num_tokens])
        k = device.rows_on_host(key[:num_tokens])
        v = device.rows_on_host(value[:num_tokens])
        out = device.host_output(output[:num_tokens])
        call = _LayerCall(exchange, lane, exchange.layer_index(layer), q, k, v, out)
        if not step.prefill_chunks:
            if not call.attend():
                return output.zero_()
            device.put_output(out, output[:num_tokens])
            return output

        # While the attention worker stores k, v and attends over the context, the chunks attend among themselves here.
        call.post()
        prefill = slice(step.prefill_chunks[0].start, num_tokens)
        local_out, local_lse = self.attend_locally(query[prefill], key[prefill], value[prefill], step.chunks)
        context_out = torch.empty(step.num_context_rows, self.num_heads, self.head_size, dtype=q.dtype)
        context_lse = torch.empty(step.num_context_rows, self.num_heads, dtype=torch.float32)
        if not call.collect(context_out, context_lse):
            return output.zero_()
        # Before the chunks' rows are written: it covers the decodes' rows only where the output had to be staged.
        device.put_output(out, output[:num_tokens])
        for chunk in step.prefill_chunks:
            if chunk.context_start is None:
                continue
            rows = slice(chunk.start - prefill.start, chunk.end - prefill.start)
            context = slice(chunk.context_start, chunk.context_start + chunk.end - chunk.start)
            local_out[rows] = merge_by_lse(
                local_out[rows],
                local_lse[rows],
                context_out[context].to(output.device),
                context_lse[context].to(output.device),
            )
        output[prefill] = local_out
        return output


class _LayerCall:
    """The tensors of one layer as the native client takes them: addresses, and bytes from token to token.

    While it waits for the attention worker, another lane may use the compute device.
    """

    def __init__(
        self,
        exchange: Exchange,
        lane: int,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self.exchange = exchange
        self.client = exchange.client
        self.timeout = exchange.timeout
        self.where = (lane, layer)
        size = q.element_size()
        self.qkv = (
            q.data_ptr(),
            q.stride(0) * size,
            k.data_ptr(),
            k.stride(0) * size,
            v.data_ptr(),
            v.stride(0) * size,
        )
        self.out = (out.data_ptr(), out.stride(0) * size)

    def attend(self) -> bool:
        """Whether there is an output: not if an attention worker was lost."""
        context = forward_context.take_aside()
        try:
            self.client.attend(*self.where, *self.qkv, *self.out, timeout=self.timeout)
        except ChannelError as error:
            self.exchange.fail_step(self.where[0], error)
            return False
        finally:
            forward_context.put_back(context)
        return True

    def post(self) -> None:
        self.client.post(*self.where, *self.qkv, timeout=self.timeout)

    def collect(self, context_out: torch.Tensor, context_lse: torch.Tensor) -> bool:
        """Whether there is an output: not if an attention worker was lost."""
        context = forward_context.take_aside()
        try:
            self.client.collect(
                *self.where, *self.out, context_out.data_ptr(), context_lse.data_ptr(), timeout=self.timeout
            )
        except ChannelError as error:
            self.exchange.fail_step(self.where[0], error)
            return False
        finally:
            forward_context.put_back(context)
        return True


def merge_by_lse(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> torch.Tensor:
    """Attention over the union of two disjoint sets of tokens, from the attention over each.

    ``A = (A_a S_a + A_b S_b) / (S_a + S_b)`` with ``S = exp(LSE)`` (the merge of the Lamina paper), written as
    ``A_a + (A_b - A_a) sigmoid(LSE_b - LSE_a)`` so that nothing overflows.

    Parameters
    ----------
    out_a, out_b
        [tokens, num_heads, head_size], the same dtype.
    lse_a, lse_b
        [tokens, num_heads], float32; ``lse_b`` may be -inf (an empty set), ``lse_a`` may not.

    Returns
    -------
    torch.Tensor
        [tokens, num_heads, head_size] in the dtype of ``out_a``.
    """
    weight = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    return torch.lerp(out_a.float(), out_b.float(), weight).to(out_a.dtype)
