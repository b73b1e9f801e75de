"""What vLLM asks of an attention backend on a GPU, and Lamina's answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_lamina.attention_backend import Exchange, LaminaAttentionBackend
from vllm_lamina.attention_backend.impl import LaminaAttentionImpl
from vllm_lamina.attention_backend.metadata import LaminaMetadataBuilder
from vllm_lamina.compat.backends import override_attention_backend, restore_attention_backend
from vllm_lamina.device import device_for

BACKEND: dict[str, Any] = {
    "full_cls_name": ("vllm_lamina.attention_backend.backend", "LaminaAttentionBackend"),
    "get_builder_cls": LaminaMetadataBuilder,
    "get_impl_cls": LaminaAttentionImpl,
    "get_name": "CUSTOM",
    "get_supported_head_sizes": list(range(32, 513, 16)),
    "get_supported_kernel_block_sizes": [MultipleOf(32)],
    "forward_includes_kv_cache_update": True,
    "is_mla": False,
    "is_sparse": False,
    "is_ssm": False,
    "supported_dtypes": [torch.float32, torch.bfloat16, torch.float16],
    "supported_kv_cache_dtypes": ["auto", "float32", "bfloat16", "float16"],
    "supported_kv_cache_layouts": (KVCacheLayout.LBHNC,),
    "supports_alibi_sqrt": False,
    "supports_batch_invariance": False,
    "supports_dcp": False,
    "supports_device_cpu_query_lens_mismatch": False,
    "supports_kv_cache_update_bypass": False,
    "supports_kv_connector": False,
    "supports_mm_prefix": True,
    "supports_non_causal": False,
    "supports_non_causal_dcp": False,
    "supports_pcp": False,
    "supports_per_head_quant_scales": False,
    "supports_rswa": False,
    "supports_sink": True,
    "supports_sliding_window": True,
}
"""Attributes of the class, and what its methods say that are asked without more."""

ASKED_OF_A_CONFIGURATION = {
    "customize_spec",
    "get_preferred_block_size",
    "supports_attn_type",
    "supports_block_size",
    "supports_combination",
    "supports_compute_capability",
    "supports_dtype",
    "supports_head_size",
    "supports_kv_cache_dtype",
    "validate_configuration",
}

BUILDER: dict[str, Any] = {
    "reorder_batch_threshold": 1,
    "requires_block_table_width": False,
    "supports_draft_decode_metadata_update": False,
    "supports_update_block_table": False,
}

IMPL: dict[str, Any] = {
    "can_return_lse_for_decode": False,
    "is_sparse": False,
    "need_to_return_lse_for_decode": False,
    "supports_dcp": False,
    "supports_mtp_with_cp_non_trivial_interleave_size": False,
    "supports_pcp": False,
    "supports_quant_query_input": False,
}

NOT_ASKED: dict[type, set[str]] = {
    AttentionMetadataBuilder: {
        "build",
        "build_for_cudagraph_capture",
        "build_for_drafting",
        "get_cudagraph_support",
        "get_varlen_cudagraph_max_query_len",
        "update_block_table",
        "update_draft_decode_metadata",
    },
    AttentionImpl: {
        "do_qk_norm_mrope_kvcache_update",
        "do_qk_norm_rope_kvcache_update",
        "do_rope_and_kv_cache_update",
        "forward",
        "fused_output_quant_supported",
        "fused_qk_norm_mrope_kvcache_supported",
        "fused_qk_norm_rope_kvcache_supported",
        "fused_rope_kvcache_supported",
        "get_impl_variants",
        "kv_quant_mode",
        "lse_base_on_e",
        "prepare_for_batch",
        "process_weights_after_loading",
        "set_interleaved_v_cache",
        "supports_dense_mha_prefill",
    },
}
"""What these do, or is about other kinds of attention; what is fused is tested below."""


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's platform of a machine with one, and the backend as a model worker there registers it."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("_C_stable_libtorch"))
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H100(NonNvmlCudaPlatform):  # type: ignore[misc]
        capability = DeviceCapability(9, 0)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return cls.capability

    device = device_for("cuda")
    exchange = Exchange(device, timeout=1.0).activate()
    override_attention_backend(device.backend_name, "vllm_lamina.attention_backend.LaminaAttentionBackend")
    yield H100
    restore_attention_backend(device.backend_name)
    exchange.deactivate()


def names(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def test_there_is_an_answer_to_each_question() -> None:
    """Fails when a release of vLLM asks for more."""
    assert names(AttentionBackend) <= BACKEND.keys() | ASKED_OF_A_CONFIGURATION
    assert names(AttentionMetadataBuilder) <= BUILDER.keys() | NOT_ASKED[AttentionMetadataBuilder]
    assert names(AttentionImpl) <= IMPL.keys() | NOT_ASKED[AttentionImpl]


@pytest.mark.parametrize("name", BACKEND)
def test_answers_of_the_backend(name: str, h100: Any) -> None:
    if name not in names(AttentionBackend):
        pytest.skip("this vLLM does not ask")
    answer = getattr(LaminaAttentionBackend, name)
    called = callable(answer) and not isinstance(answer, type)
    assert (answer() if called else answer) == BACKEND[name]


@pytest.mark.parametrize(
    ("cls", "name", "answer"),
    [(LaminaMetadataBuilder, *item) for item in BUILDER.items()]
    + [(LaminaAttentionImpl, *item) for item in IMPL.items()],
)
def test_answers_of_the_builder_and_the_layer(cls: type, name: str, answer: Any) -> None:
    assert getattr(cls, name) == answer


def test_steps_of_decodes_alone_are_captured() -> None:
    support = LaminaMetadataBuilder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_nothing_is_fused_into_a_layer(h100: Any) -> None:
    layer = LaminaAttentionImpl(2, 32, 0.1, 1)
    assert not any(
        (
            layer.fused_output_quant_supported(None),
            layer.fused_qk_norm_mrope_kvcache_supported(),
            layer.fused_qk_norm_rope_kvcache_supported(),
            layer.fused_rope_kvcache_supported(),
        )
    )


def test_preferred_blocks_are_as_the_user_has_them_where_they_fit() -> None:
    assert [LaminaAttentionBackend.get_preferred_block_size(size) for size in (16, 64, 128)] == [32, 64, 128]


def selected(platform: Any, **changes: Any) -> str:
    """What the platform selects for a layer, when the configuration names Lamina's backend."""
    config = AttentionSelectorConfig(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=128
    )
    chosen: str = platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, config._replace(**changes))
    return chosen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_size": None},
        {"block_size": 32},
        {"block_size": 96},
        {"dtype": torch.float16},
        {"dtype": torch.float32, "head_size": 32},
        {"head_size": 80},
        {"head_size": 512},
        {"has_sliding_window": True, "has_sink": True},
        {"kv_cache_dtype": "bfloat16"},
        {"kv_cache_dtype": None},
    ],
    ids=str,
)
def test_served(h100: Any, changes: dict[str, Any]) -> None:
    assert selected(h100, **changes).endswith("LaminaAttentionBackend")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 24}, "head_size not supported"),
        ({"head_size": 528}, "head_size not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"block_size": 16}, "block_size not supported"),
        ({"block_size": 48}, "block_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"use_rswa": True}, "R-SWA not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_kv_connector": True}, "KV connector not supported"),
        ({"use_pcp": True}, "PCP not supported"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"use_adaptive_verification": True}, "device-cpu query lens mismatch not supported"),
    ],
    ids=str,
)
def test_refused(h100: Any, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(
        ValueError, match=rf"CUSTOM is not valid for this configuration. Reason: \['.*{reason}"
    ):
        selected(h100, **changes)


def test_older_gpus_are_refused(h100: Any) -> None:
    h100.capability = type(h100.capability)(7, 5)
    with pytest.raises(ValueError, match="compute capability not supported"):
        selected(h100)
