"""The metadata of one step: told to the attention worker once, then read by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_lamina.attention_backend.exchange import Exchange

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


@dataclass(frozen=True)
class PrefillChunk:
    """Query tokens of one request that attend among themselves on the model worker.

    ``context_start`` is the first of the chunk's rows in what the attention worker returns for the context, or None
    where the request has no context.
    """

    start: int
    end: int
    context_start: int | None


@dataclass(frozen=True)
class LaminaMetadata:
    """One step of one lane.

    Tokens are ordered as vLLM orders them: the decodes first, one token each, then the prefill chunks.
    """

    exchange: Exchange
    lane: int
    num_tokens: int
    prefill_chunks: tuple[PrefillChunk, ...]
    num_context_rows: int


class LaminaMetadataBuilder(AttentionMetadataBuilder[LaminaMetadata]):
    """Describes each step to the attention worker before the first layer runs."""

    # Requests with one query token and a full prompt behind them come first in the batch.
    reorder_batch_threshold = 1

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.exchange = Exchange.current()
        self.lane = 0

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LaminaMetadata:
        step = common_attn_metadata
        num_tokens: int = step.num_actual_tokens
        starts = step.query_start_loc_cpu[: step.num_reqs + 1].to(torch.int32)
        query_lens = starts.diff()
        context_lens = _on_host(step.seq_lens[: step.num_reqs], torch.int32) - query_lens

        num_decodes = _count_leading_ones(query_lens.tolist(), context_lens.tolist())
        _, num_context_rows = self.exchange.client.begin_step(
            self.lane,
            num_decodes,
            query_lens.numpy(),
            context_lens.numpy(),
            _on_host(step.block_table_tensor[: step.num_reqs], torch.int32).numpy(),
            _on_host(step.slot_mapping[:num_tokens], torch.int64).numpy(),
            self.exchange.timeout,
        )
        chunks = tuple(_prefill_chunks(starts.tolist(), context_lens.tolist(), num_decodes))
        return LaminaMetadata(self.exchange, self.lane, num_tokens, chunks, num_context_rows)


def _on_host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device="cpu", dtype=dtype)


def _count_leading_ones(query_lens: list[int], context_lens: list[int]) -> int:
    """How many requests at the head of the batch decode: one query token, and context behind it."""
    count = 0
    for query_len, context_len in zip(query_lens, context_lens, strict=True):
        if query_len != 1 or context_len == 0:
            break
        count += 1
    return count


def _prefill_chunks(starts: list[int], context_lens: list[int], num_decodes: int) -> Any:
    row = 0
    for request in range(num_decodes, len(context_lens)):
        start, end = starts[request], starts[request + 1]
        if context_lens[request] == 0:
            yield PrefillChunk(start, end, None)
        else:
            yield PrefillChunk(start, end, row)
            row += end - start
