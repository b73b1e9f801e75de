"""What vLLM's metadata builder hands to every layer of a step: the step that is at hand, and nothing else happens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.attention_backend.spans import Spans
from vllm_lamina.attention_backend.step import Step
from vllm_lamina.compat.attention import check_metadata

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


@dataclass
class LaminaMetadata:
    """One step of one lane; ``step`` is None where vLLM profiles, warms up or captures, and nothing is attended.

    ``captures`` says that the layers are captured whole. ``mm_prefix_range`` are the step's `Spans`; a model that has
    them in some of its layers only sets it to None for the others, by this name.
    """

    exchange: Exchange
    lane: int
    step: Step | None
    captures: bool = False
    mm_prefix_range: Spans | None = None


class LaminaMetadataBuilder(AttentionMetadataBuilder[LaminaMetadata]):
    """Hands the step on. vLLM builds as often as it likes; what it says of the step is checked, and not read."""

    # Prefill chunks attend locally, in grids that differ from step to step: see docs/gpu.md.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
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
        check_metadata(common_attn_metadata)
        step = self.exchange.step(self.lane)
        # Here, not in the first layer: vLLM calls no layer in a step whose graph it replays.
        self.exchange.layers.prepare(self.lane, step)
        metadata = LaminaMetadata(self.exchange, self.lane, step)
        if step is not None and common_attn_metadata.mm_req_doc_ranges:
            metadata.mm_prefix_range = step.spans(common_attn_metadata.mm_req_doc_ranges)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> LaminaMetadata:
        return replace(self.build(0, common_attn_metadata), captures=True)
