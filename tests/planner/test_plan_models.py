"""Models are read from Hugging Face configurations: dense, grouped, multi-query, latent, experts, windows."""

import json
from pathlib import Path

import pytest

from vllm_lamina.errors import ConfigError, LaminaError, UnsupportedError
from vllm_lamina.planner.model_configs import load_model, model_from_config

DENSE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}


def test_dense_by_hand() -> None:
    model = model_from_config(DENSE, "tiny")
    attention, feed_forward = 4 * 64 * 64, 3 * 64 * 128
    assert model.dense_params == 2 * (attention + feed_forward) + 100 * 64
    assert model.weight_bytes == 2 * (model.dense_params + 100 * 64)
    assert model.group == 1
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 64


def test_grouped_and_multi_query() -> None:
    assert model_from_config({**DENSE, "num_key_value_heads": 2}, "gqa").group == 2
    assert model_from_config({**DENSE, "multi_query": True}, "mqa").kv_heads == 1
    wide = model_from_config({**DENSE, "num_key_value_heads": 2, "head_dim": 32}, "wide heads")
    assert wide.query_bytes_per_token == 2 * 2 * 4 * 32
    assert wide.kv_bytes_per_token == 2 * 2 * 2 * 2 * 32


def test_tied_embeddings_and_float32() -> None:
    model = model_from_config({**DENSE, "tie_word_embeddings": True, "torch_dtype": "float32"}, "tied")
    assert model.embedding_params == 0
    assert model.weight_bytes == 4 * model.dense_params


def test_experts_by_hand() -> None:
    config = {
        **DENSE,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 16,
    }
    model = model_from_config(config, "moe")
    expert = 3 * 64 * 32
    dense = 2 * 4 * 64 * 64 + 3 * 64 * 128 + (64 * 8 + 3 * 64 * 16) + 100 * 64
    assert model.dense_params == dense
    assert model.active_params == dense + 2 * expert
    assert model.weight_bytes == 2 * (dense + 100 * 64 + 8 * expert)
    assert float(model.streamed_bytes(1)) == pytest.approx(2 * model.active_params)


# What of published configurations concerns the planner: gemma-3-27b-it leaves out what equals its class's defaults.
GEMMA_3_27B = {
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "intermediate_size": 21504,
        "sliding_window": 1024,
    },
}
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}
LLAMA_4_SCOUT = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 1,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "vocab_size": 202048,
        "attention_chunk_size": 8192,
        "no_rope_layers": [],
    },
}
GEMMA_4_31B = {
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_size": 5376,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "intermediate_size": 21504,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 262144,
        "num_kv_shared_layers": 0,
        "num_experts": None,
        "vocab_size": 262144,
        "sliding_window": 1024,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
        "tie_word_embeddings": True,
    },
}
# The same as transformers writes it now.
GEMMA_4_BY_LAYER = {
    **{
        key: value
        for key, value in GEMMA_4_31B["text_config"].items()  # type: ignore[attr-defined]
        if key not in ("num_global_key_value_heads", "global_head_dim")
    },
    "per_layer_config": {str(i): {"num_key_value_heads": 4, "head_dim": 512} for i in range(5, 60, 6)},
}


@pytest.mark.parametrize(
    ("config", "billions", "active", "full", "local", "window"),
    [
        # Bytes of k and v of a token, in the layers that keep all tokens and in those that keep a window or a chunk.
        (GEMMA_3_27B, 27.0, 27.0, 10 * 8192, 52 * 8192, 1024),
        (GPT_OSS_120B, 116.8, 5.1, 18 * 2048, 18 * 2048, 128),
        (LLAMA_4_SCOUT, 107.8, 17.0, 12 * 4096, 36 * 4096, 8192),
        (GEMMA_4_31B, 30.7, 30.7, 10 * 8192, 50 * 16384, 1024),
        (GEMMA_4_BY_LAYER, 30.7, 30.7, 10 * 8192, 50 * 16384, 1024),
    ],
    ids=["gemma-3-27b", "gpt-oss-120b", "llama-4-scout", "gemma-4-31b", "gemma-4-31b by layer"],
)
def test_layers_of_several_kinds(
    config: dict[str, object], billions: float, active: float, full: int, local: int, window: int
) -> None:
    model = model_from_config(config, "several kinds")
    assert model.weight_bytes / 2e9 == pytest.approx(billions, rel=0.02)
    assert model.active_params / 1e9 == pytest.approx(active, rel=0.08)
    assert model.kv_bytes_per_token == full + local
    for tokens in (100, 100_000):
        kept = full * tokens + local * min(tokens, window)
        assert model.kept.tokens(tokens) * model.kv_bytes_per_token == pytest.approx(kept)


def test_layers_that_share_k_and_v_read_but_keep_none() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    config = {
        **DENSE,
        "num_hidden_layers": 4,
        "layer_types": types,
        "sliding_window": 10,
        "num_kv_shared_layers": 2,
    }
    model = model_from_config(config, "shared")
    assert model.kv_bytes_per_token == 2 * (2 * 2 * 64)
    assert model.read_bytes_per_token == 4 * (2 * 2 * 64)
    assert model.kept.tokens(30) == model.read.tokens(30) == (30 + 10) / 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "layers of the kind 'linear_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types of odd must have 2 entries"),
        ({"num_attention_heads_per_layer": [4]}, "num_attention_heads_per_layer of odd must have 2 entries"),
        ({"per_layer_config": {"1": {"intermediate_size": 7}}}, "layers whose intermediate_size differs"),
        ({"per_layer_config": {"1": 7}}, "per_layer_config of odd must hold an object for each layer"),
        ({"per_layer_config": {"1": {"head_dim": "7"}}}, "head_dim of odd must be a whole number"),
        ({"block_configs": [{}, {}]}, r"layers of other sizes \(block_configs\)"),
    ],
)
def test_layers_that_are_not_described(fields: dict[str, object], message: str) -> None:
    with pytest.raises(LaminaError, match=message):
        model_from_config({**DENSE, **fields}, "odd")


def test_text_part_of_a_multimodal_configuration() -> None:
    assert model_from_config({"text_config": DENSE, "vision_config": {}}, "vision").hidden == 64


def test_latent_attention_by_hand() -> None:
    latent = DENSE | {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 24}
    model = model_from_config(latent, "latent")
    shared = 64 * (48 + 16) + 48 * 4 * (32 + 24) + 4 * 24 * 64
    assert model.dense_params == 2 * (64 * 4 * 48 + shared + 3 * 64 * 128) + 100 * 64
    assert (
        model_from_config(latent | {"q_lora_rank": 20}, "q too").dense_params
        == 2 * (20 * 64 + 20 * 4 * 48 + shared + 3 * 64 * 128) + 100 * 64
    )
    assert model.kv_bytes_per_token == 2 * 2 * (48 + 16)
    assert (model.query_bytes_per_token, model.output_bytes_per_token) == (2 * 2 * 4 * 64, 2 * 2 * 4 * 48)
    assert model.wire_bytes_per_token == 2 * 2 * (4 * 64 + 4 * 48 + 64)
    assert model.attention_flops_per_cached_token == 2 * 2 * 4 * (64 + 48)
    assert model.prompt_attention_flops(10, 35) == 2 * 2 * 4 * (48 + 24) * 10 * (35 + 5)
    assert model.group == 4
    expanded = model_from_config(latent | {"model_type": "minicpm3", "v_head_dim": None}, "all heads")
    assert expanded.dense_params == model_from_config(latent | {"v_head_dim": 16}, "").dense_params
    assert expanded.kv_bytes_per_token == 2 * 2 * 2 * 4 * (32 + 16)


def test_deepseek_v3_has_671_billion_parameters() -> None:
    model = load_model("deepseek-v3")
    assert model.weight_bytes / 2e9 == pytest.approx(671, rel=0.002)
    assert model.active_params / 1e9 == pytest.approx(37, rel=0.03)
    assert model.kv_bytes_per_token == 61 * 576 * 2


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="sparse attention by an indexer"):
        model_from_config({**DENSE, "index_topk": 2048}, "deepseek")
    with pytest.raises(UnsupportedError, match=r"layers that keep a state \(hybrid_override_pattern\)"):
        model_from_config({**DENSE, "hybrid_override_pattern": "M*"}, "nemotron")
    with pytest.raises(ConfigError, match="no 'num_hidden_layers'"):
        model_from_config({"hidden_size": 64}, "unknown")


def test_load_from_file_and_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    assert load_model(str(tmp_path)).hidden == load_model(str(tmp_path / "config.json")).hidden == 64
    named = tmp_path / "My-Model-config.json"
    named.write_text(json.dumps(DENSE))
    assert load_model(str(named)).name == "My-Model"
    named.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_model(str(named))


def test_text_part_within_another_part() -> None:
    config = {"thinker_config": {"text_config": DENSE, "audio_config": {}}, "hidden_size": 7}
    assert model_from_config(config, "omni").hidden == 64
