"""Configurations of small hybrid models, in which some layers keep a state."""

from __future__ import annotations

from typing import Any

from model_specs import FULL, ModelSpec, decoder


def _mamba(**config: Any) -> dict[str, Any]:
    """Fields that models with Mamba 2 share: one group of states, as two differ from transformers in stock vLLM."""
    return (
        decoder(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            mamba_n_heads=8,
            mamba_d_head=64,
            mamba_d_ssm=512,
            mamba_n_groups=1,
            mamba_d_state=32,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_chunk_size=64,
        )
        | config
    )


def _short_convolutions(layer_types: list[str], **config: Any) -> dict[str, Any]:
    return (
        decoder(
            num_hidden_layers=len(layer_types),
            layer_types=layer_types,
            num_attention_heads=4,
            num_key_value_heads=2,
            conv_L_cache=3,
            conv_bias=False,
            # vLLM reads two fields that transformers' class lacks.
            conv_dim=256,
            block_dim=256,
        )
        | config
    )


# Models with layers that keep a state: vLLM's groups are of states (M) and of full attention (F).
HYBRID: dict[str, ModelSpec] = {
    # M(2) and F(2); short convolutions.
    "lfm2": ModelSpec("Lfm2Config", _short_convolutions(layer_types=["conv", FULL] * 2)),
    # The same, with experts in two layers: all of them, for which rounding cannot choose others.
    "lfm2_moe": ModelSpec(
        "Lfm2MoeConfig",
        _short_convolutions(
            layer_types=["conv", FULL] * 2,
            num_dense_layers=2,
            num_experts=4,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
        ),
    ),
    # M(1) and four groups F(1): vLLM's groups have as many layers as the rarer kind.
    "lfm2_one_state": ModelSpec(
        "Lfm2Config", _short_convolutions(layer_types=[FULL, FULL, "conv", FULL, FULL])
    ),
    # F(3) and M(3): each layer has both.
    "falcon_h1": ModelSpec("FalconH1Config", _mamba()),
    # M(2) and F(2), and layers of neither kind.
    "nemotron_h": ModelSpec(
        "NemotronHConfig",
        decoder(
            num_hidden_layers=6,
            layers_block_type=["mamba", "mlp", "attention"] * 2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            mamba_num_heads=8,
            mamba_head_dim=64,
            n_groups=1,
            ssm_state_size=32,
            conv_kernel=4,
            expand=2,
            chunk_size=64,
        ),
    ),
    "granitemoehybrid": ModelSpec(
        "GraniteMoeHybridConfig",
        _mamba(
            num_hidden_layers=4,
            layer_types=["mamba", "attention"] * 2,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=256,
            position_embedding_type="rope",
        ),
    ),
    # F(2) and M in two groups of two: attention layers of one set of weights.
    "zamba2": ModelSpec(
        "Zamba2Config",
        decoder(
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid"] * 2,
            num_attention_heads=4,
            num_key_value_heads=4,
            mamba_d_state=32,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_ngroups=1,
            n_mamba_heads=8,
            chunk_size=64,
            num_mem_blocks=1,
            use_mem_rope=True,
        ),
    ),
}


def _delta_net(**config: Any) -> dict[str, Any]:
    """Three layers with a gated delta net and one with attention, dense; vLLM's operators for CPUs want these heads."""
    return (
        decoder(
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        )
        | config
    )


# Three groups of states and one of full attention: on a CPU in bfloat16 alone.
DELTA_NET: dict[str, ModelSpec] = {
    "qwen3_next": ModelSpec(
        "Qwen3NextConfig",
        _delta_net(
            # vLLM wants a layer with experts; all of them, for which rounding cannot choose others.
            mlp_only_layers=[0, 1, 2],
            num_experts=4,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        ),
    ),
    "qwen3_5": ModelSpec("Qwen3_5TextConfig", _delta_net()),
}
