"""Models are read from Hugging Face configurations: dense, grouped, multi-query, latent, mixture of experts."""

import json
from pathlib import Path

import pytest

from vllm_lamina.errors import ConfigError, UnsupportedError
from vllm_lamina.planner.models import load_model, model_from_config

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
    assert wide.query_bytes == 2 * 4 * 32
    assert wide.key_value_bytes == 2 * 2 * 2 * 32


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
    assert (model.query_bytes, model.output_bytes) == (2 * 4 * 64, 2 * 4 * 48)
    assert model.wire_bytes_per_token == 2 * 2 * (4 * 64 + 4 * 48 + 64)
    assert model.attention_flops_per_cached_token == 2 * 2 * 4 * (64 + 48)
    assert model.prefill_flops_per_cached_token == 2 * 2 * 4 * (48 + 24)
    assert model.group == 4


def test_deepseek_v3_has_671_billion_parameters() -> None:
    model = load_model("deepseek-v3")
    assert model.weight_bytes / 2e9 == pytest.approx(671, rel=0.002)
    assert model.active_params / 1e9 == pytest.approx(37, rel=0.03)
    assert model.kv_bytes_per_token == 61 * 576 * 2


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="sparse attention by an indexer"):
        model_from_config({**DENSE, "index_topk": 2048}, "deepseek")
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
