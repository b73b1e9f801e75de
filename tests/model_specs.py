"""Configurations of small models: one per attention variant that Lamina runs, or must refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import runners

VOCAB_SIZE = 1024
MAX_POSITION = 8192


@dataclass(frozen=True)
class ModelSpec:
    """A model to create: the transformers classes' name stem and the configuration's fields."""

    config_class: str
    config: dict[str, Any]
    model_class: str = "AutoModelForCausalLM"


def decoder(**config: Any) -> dict[str, Any]:
    """Fields that the Llama-like configurations share."""
    return {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "max_position_embeddings": MAX_POSITION,
    } | config


# The supported families. The head sizes cover 32 to 256, the group sizes (query heads per KV head) 1 to 8.
SUPPORTED: dict[str, ModelSpec] = {
    "llama": ModelSpec("LlamaConfig", decoder(num_attention_heads=8, num_key_value_heads=2, head_dim=32)),
    "qwen2": ModelSpec(
        "Qwen2Config", decoder(num_attention_heads=4, num_key_value_heads=2, use_sliding_window=False)
    ),
    "qwen3": ModelSpec("Qwen3Config", decoder(num_attention_heads=4, num_key_value_heads=1, head_dim=256)),
    "mistral": ModelSpec(
        "MistralConfig",
        decoder(num_attention_heads=6, num_key_value_heads=2, head_dim=128, sliding_window=None),
    ),
    "phi3": ModelSpec(
        "Phi3Config",
        decoder(
            hidden_size=192,
            num_attention_heads=2,
            num_key_value_heads=2,
            original_max_position_embeddings=MAX_POSITION,
            sliding_window=None,
        ),
    ),
    "mixtral": ModelSpec(
        "MixtralConfig",
        decoder(
            num_attention_heads=4,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
    ),
    "gpt2": ModelSpec("GPT2Config", {"n_embd": 160, "n_layer": 3, "n_head": 2, "n_positions": MAX_POSITION}),
    "falcon": ModelSpec(
        "FalconConfig",
        {
            "hidden_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "alibi": False,
            "bias": False,
            "max_position_embeddings": MAX_POSITION,
        },
    ),
}

# Four KV heads: they divide by two and by four, and unevenly by three.
OTHERS: dict[str, ModelSpec] = {
    "four_kv_heads": ModelSpec(
        "LlamaConfig", decoder(num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    ),
}

SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"


def _windows(*layer_types: str, **config: Any) -> dict[str, Any]:
    """A decoder with a layer of each of these types; one that slides sees 32 tokens, a quarter of a KV block."""
    return (
        decoder(
            num_hidden_layers=len(layer_types),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            sliding_window=32,
            layer_types=list(layer_types),
        )
        | config
    )


# Models whose layers are of several kinds, or do more with scores than scale them. The comments say vLLM's groups.
LAYERED: dict[str, ModelSpec] = {
    # A soft-cap that bends most scores, two layers with a window and two without.
    "gemma2": ModelSpec(
        "Gemma2Config",
        _windows(
            *(SLIDING, FULL) * 2,
            attn_logit_softcapping=3.0,
            query_pre_attn_scalar=64,
            tie_word_embeddings=True,
        ),
    ),
    # Three groups with a window, one without, of a layer each.
    "gemma3": ModelSpec(
        "Gemma3TextConfig",
        _windows(SLIDING, SLIDING, SLIDING, FULL, query_pre_attn_scalar=64),
    ),
    # The last two layers read what others keep: they are in no group.
    "gemma3n": ModelSpec(
        "Gemma3nTextConfig",
        _windows(
            *(SLIDING, FULL) * 3,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=32,
            laurel_rank=16,
            activation_sparsity_pattern=[0.0] * 6,
            tie_word_embeddings=True,
        ),
    ),
    # Heads of 64 with a window, of 128 without: blocks of twice as many tokens for the former.
    "gemma4": ModelSpec(
        "Gemma4TextConfig",
        _windows(
            *(SLIDING, SLIDING, FULL) * 2,
            global_head_dim=128,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=32,
        ),
    ),
    "gemma4_shared": ModelSpec(
        "Gemma4TextConfig",
        _windows(
            *(SLIDING, SLIDING, FULL) * 2,
            num_kv_shared_layers=3,
            global_head_dim=128,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=32,
        ),
    ),
    # Full layers whose values are their keys, of fewer heads: windows in blocks of other sizes and other heads.
    "gemma4_keys_are_values": ModelSpec(
        "Gemma4TextConfig",
        _windows(
            *(SLIDING, SLIDING, FULL) * 2,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            global_head_dim=128,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=32,
        ),
    ),
    "gpt_oss": ModelSpec(
        "GptOssConfig",
        _windows(*(SLIDING, FULL) * 2, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2),
    ),
    # One group, with a window.
    "mistral_window": ModelSpec(
        "MistralConfig",
        decoder(num_attention_heads=6, num_key_value_heads=2, head_dim=128, sliding_window=32),
    ),
    "phi3_window": ModelSpec(
        "Phi3Config",
        decoder(
            hidden_size=192,
            num_attention_heads=2,
            num_key_value_heads=2,
            original_max_position_embeddings=MAX_POSITION,
            sliding_window=32,
        ),
    ),
    "starcoder2": ModelSpec(
        "Starcoder2Config", decoder(num_attention_heads=4, num_key_value_heads=2, sliding_window=32)
    ),
    "cohere2": ModelSpec(
        "Cohere2Config", _windows(SLIDING, SLIDING, SLIDING, FULL, logit_scale=1.0, tie_word_embeddings=True)
    ),
    "olmo3": ModelSpec("Olmo3Config", _windows(SLIDING, SLIDING, SLIDING, FULL)),
    # Dense; the chunk is a multiple of the KV block, as vLLM wants it.
    "llama4": ModelSpec(
        "Llama4TextConfig",
        decoder(
            intermediate_size_mlp=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            attention_chunk_size=128,
            layer_types=[CHUNKED, CHUNKED, CHUNKED, FULL],
            no_rope_layers=[1, 1, 1, 0],
            moe_layers=[],
            interleave_moe_layer_step=0,
        ),
    ),
    # Query heads by layer.
    "laguna": ModelSpec(
        "LagunaConfig",
        _windows(
            *(FULL, SLIDING) * 2, num_attention_heads_per_layer=[4, 8] * 2, mlp_layer_types=["dense"] * 4
        ),
    ),
    "bloom": ModelSpec(
        "BloomConfig", {"hidden_size": 256, "n_layer": 3, "n_head": 4, "tie_word_embeddings": True}
    ),
    "falcon_alibi": ModelSpec(
        "FalconConfig",
        {
            "hidden_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "alibi": True,
            "bias": False,
        },
    ),
    # Heads of 96 for keys and 64 for values; twice as many KV heads, and sinks, where there is a window.
    "mimo_v2": ModelSpec(
        "MiMoV2FlashConfig",
        _windows(
            *(FULL, SLIDING) * 2,
            head_dim=96,
            v_head_dim=64,
            mlp_layer_types=["dense"] * 4,
            n_routed_experts=1,
            num_experts_per_tok=1,
            hybrid_layer_pattern=[0, 1] * 2,
            moe_layer_freq=[0] * 4,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=4,
            swa_head_dim=96,
            swa_v_head_dim=64,
            sliding_window_size=32,
            rope_theta=5_000_000.0,
            swa_rope_theta=10_000.0,
            partial_rotary_factor=0.334,
            layernorm_epsilon=1e-5,
            add_swa_attention_sink_bias=True,
        ),
    ),
}


def _latent(**config: Any) -> dict[str, Any]:
    """Latent attention in the only sizes that vLLM's own backend for CPUs takes; one layer has no experts."""
    return (
        decoder(
            num_attention_heads=4,
            num_key_value_heads=4,
            kv_lora_rank=512,
            q_lora_rank=96,
            qk_nope_head_dim=48,
            qk_rope_head_dim=64,
            v_head_dim=64,
            moe_intermediate_size=64,
            first_k_dense_replace=1,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
        )
        | config
    )


LATENT: dict[str, ModelSpec] = {
    "deepseek_v2": ModelSpec("DeepseekV2Config", _latent(q_lora_rank=None)),
    # vLLM reads two fields that transformers' class lacks.
    "deepseek_v3": ModelSpec("DeepseekV3Config", _latent(topk_method="noaux_tc", scoring_func="sigmoid")),
    "glm4_moe_lite": ModelSpec("Glm4MoeLiteConfig", _latent(topk_method="noaux_tc", v_head_dim=112)),
    # By vLLM's Transformers backend.
    "youtu": ModelSpec("YoutuConfig", _latent(kv_lora_rank=256, qk_rope_head_dim=32)),
}

PLAIN_ROTARY = {"custom_ops": ["all", "-rotary_embedding"]}
"""vLLM's compilation_config for these: its rotary operator for CPUs is wrong where q has three dimensions."""

EXPANDED = {"VLLM_MLA_DISABLE": "1"}
"""An environment in which vLLM keeps keys and values of all heads in place of a latent row."""

EXPANDED_IN_STOCK = {"youtu"}
"""Models that vLLM runs on a CPU in no other way, for its latent rows have one size there."""

NEEDS_TRITON = {"mimo_v2"}
"""Models that vLLM runs on a CPU only with its V2 model runner, whose kernels an interpreter runs."""

LAYERED_ON = [
    (family, runner)
    for family in LAYERED
    for runner in (runners.V1, runners.V2)
    if runner == runners.V2 or family not in NEEDS_TRITON
]
"""Each of them with the model runners that stock vLLM runs it on."""

TOLERANCES = {"gemma3n": 5e-4, "gemma4": 2e-4, "zamba2": 2e-4}
"""Of log-probabilities where norms of large weights, which such a random model needs, enlarge what is rounded: in a
text of 300 tokens gemma4's are 1.1e-4 from float64's in stock vLLM, and 0.7e-4 with Lamina. zamba2's are 1.4e-4 from
float64's in transformers."""


# Models whose attention has a feature that Lamina does not implement: startup must refuse each by name.
UNSUPPORTED: dict[str, ModelSpec] = {
    "prefix_lm": ModelSpec(
        "HrmTextConfig",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "head_dim": 32,
            "H_cycles": 1,
            "L_cycles": 1,
        },
    ),
    "attention_free": ModelSpec(
        "Mamba2Config",
        {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 64, "n_groups": 1},
    ),
    "head_size": ModelSpec(
        "LlamaConfig",
        decoder(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=40),
    ),
    # As a DeepSeek V3.2, of which it is an indexer that is seen.
    "sparse": ModelSpec("DeepseekV2Config", _latent(num_hidden_layers=2, index_topk=64)),
    "latent_size": ModelSpec("DeepseekV2Config", _latent(num_hidden_layers=2, kv_lora_rank=40)),
    "encoder_only": ModelSpec(
        "BertConfig",
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
        },
        model_class="AutoModel",
    ),
    "encoder_decoder": ModelSpec(
        "WhisperConfig",
        {
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256,
            "max_source_positions": 1500,
            "max_target_positions": 448,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        model_class="AutoModelForSpeechSeq2Seq",
    ),
}
