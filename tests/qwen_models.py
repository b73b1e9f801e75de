"""Multimodal models whose positions are in three dimensions, and Qwen's with sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hybrid_specs import DELTA_NET
from model_specs import ModelSpec
from models import RANDOM
from multimodal_spec import (
    AUDIO,
    BEGIN,
    END,
    IMAGE,
    NUM_TOKENS,
    VIDEO,
    Multimodal,
    image_text,
    mark,
    own_marks,
    text_config,
)


def _qwen_vision(**config: Any) -> dict[str, Any]:
    """An encoder of images of any size, in patches of 14 or 16, of which four make a token."""
    return (
        {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 256}
        | RANDOM
        | config
    )


def _mrope(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    return {"rope_parameters": rope | more}


QWEN_TOKENS = {
    "image_token_id": mark(IMAGE),
    "video_token_id": mark(VIDEO),
    "vision_start_token_id": mark(BEGIN),
    "vision_end_token_id": mark(END),
}
QWEN_NAMES = {
    "image_token": IMAGE,
    "video_token": VIDEO,
    "vision_start_token": BEGIN,
    "vision_end_token": END,
}
QWEN_PROMPTS = {
    "image": [mark(BEGIN), mark(IMAGE), mark(END)],
    "video": [mark(BEGIN), mark(VIDEO), mark(END)],
}


def _qwen2_audio_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.Qwen2AudioProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer)


def _pixels(patch_size: int) -> dict[str, int]:
    """From 1 to 64 tokens, each of four patches."""
    token = (2 * patch_size) ** 2
    return {"shortest_edge": token, "longest_edge": 64 * token}


def _qwen_processor(name: str, patch_size: int) -> Callable[[Any], Any]:
    def processor(tokenizer: Any) -> Any:
        import transformers

        sizes = {"size": _pixels(patch_size), "patch_size": patch_size, "merge_size": 2}
        images = transformers.Qwen2VLImageProcessor(**sizes)
        of_videos = "Qwen3VLVideoProcessor" if name == "Qwen3VLProcessor" else "Qwen2VLVideoProcessor"
        videos = getattr(transformers, of_videos)(**sizes)
        return getattr(transformers, name)(images, tokenizer, videos)

    return processor


SOUND_MARKS = ("<sound>", "</sound>")


SOUND_NAMES = {
    "image_token": IMAGE,
    "video_token": VIDEO,
    "audio_token": AUDIO,
    "vision_bos_token": BEGIN,
    "vision_eos_token": END,
    "audio_bos_token": SOUND_MARKS[0],
    "audio_eos_token": SOUND_MARKS[1],
}


def _omni_processor(name: str, patch_size: int) -> Callable[[Any], Any]:
    def processor(tokenizer: Any) -> Any:
        import transformers

        sizes = {"size": _pixels(patch_size), "patch_size": patch_size}
        return getattr(transformers, name)(
            transformers.Qwen2VLImageProcessor(**sizes),
            transformers.Qwen2VLVideoProcessor(**sizes),
            transformers.WhisperFeatureExtractor(feature_size=16),
            tokenizer,
        )

    return processor


def _omni_audio(model_type: str, **config: Any) -> dict[str, Any]:
    return (
        {
            "model_type": model_type,
            "num_mel_bins": 16,
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 96,
            "output_dim": 256,
        }
        | RANDOM
        | config
    )


GLM_MARKS = tuple(
    f"<|{mark}|>"
    for mark in ("begin_of_image", "image", "end_of_image", "begin_of_video", "video", "end_of_video")
)
GLM = own_marks(GLM_MARKS)


def _glm4v_processor(tokenizer: Any) -> Any:
    import transformers

    sizes = {"size": _pixels(14), "patch_size": 14, "merge_size": 2}
    images = transformers.Glm4vImageProcessor(**sizes)
    return transformers.Glm4vProcessor(images, tokenizer, transformers.Glm4vVideoProcessor(**sizes))


QWEN: dict[str, Multimodal] = {
    "qwen2_audio": Multimodal(
        ModelSpec(
            "Qwen2AudioConfig",
            {
                "text_config": text_config("qwen2"),
                "audio_config": {
                    "model_type": "qwen2_audio_encoder",
                    "num_mel_bins": 16,
                    "d_model": 32,
                    "encoder_layers": 2,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 64,
                },
                "audio_token_index": mark(AUDIO),
            },
            model_class="AutoModelForSeq2SeqLM",
        ),
        _qwen2_audio_processor,
        {"audio": [mark(BEGIN), mark(AUDIO), mark(END)]},
        names={"audio_token": AUDIO, "audio_bos_token": BEGIN, "audio_eos_token": END},
        renamed={"language_model.model.model.": "language_model.model."},
        needs_torchvision=False,
    ),
    # Positions in three dimensions.
    "qwen2_vl": Multimodal(
        image_text(
            "Qwen2VLConfig",
            text_config("qwen2_vl_text", **_mrope(type="mrope")),
            {"depth": 2, "embed_dim": 64, "hidden_size": 256, "num_heads": 2} | RANDOM,
            **QWEN_TOKENS,
        ),
        _qwen_processor("Qwen2VLProcessor", 14),
        QWEN_PROMPTS,
        names=QWEN_NAMES,
    ),
    "qwen2_5_vl": Multimodal(
        image_text(
            "Qwen2_5_VLConfig",
            text_config("qwen2_5_vl_text", **_mrope(type="mrope")),
            _qwen_vision(fullatt_block_indexes=[1], window_size=56),
            **QWEN_TOKENS,
        ),
        _qwen_processor("Qwen2_5_VLProcessor", 14),
        QWEN_PROMPTS,
        names=QWEN_NAMES,
    ),
    # What the encoder's first layers say is added to the hidden states behind the first layers of the decoder.
    "qwen3_vl": Multimodal(
        image_text(
            "Qwen3VLConfig",
            text_config("qwen3_vl_text", head_dim=64, **_mrope(mrope_interleaved=True)),
            _qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            **QWEN_TOKENS,
        ),
        _qwen_processor("Qwen3VLProcessor", 16),
        {"image": QWEN_PROMPTS["image"]},
        names=QWEN_NAMES,
    ),
    "qwen3_vl_moe": Multimodal(
        image_text(
            "Qwen3VLMoeConfig",
            text_config(
                "qwen3_vl_moe_text",
                head_dim=64,
                moe_intermediate_size=96,
                num_experts=4,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                **_mrope(mrope_interleaved=True),
            ),
            _qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            **QWEN_TOKENS,
        ),
        _qwen_processor("Qwen3VLProcessor", 16),
        {"image": QWEN_PROMPTS["image"]},
        names=QWEN_NAMES,
        transposed=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "glm4v": Multimodal(
        image_text(
            "Glm4vConfig",
            text_config(
                "glm4v_text",
                vocab_size=NUM_TOKENS + len(GLM_MARKS),
                **_mrope(mrope_section=[4, 6, 6], partial_rotary_factor=0.5),
            ),
            {
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_heads": 2,
                "out_hidden_size": 256,
                "image_size": 112,
                "patch_size": 14,
            }
            | RANDOM,
            image_start_token_id=GLM["<|begin_of_image|>"],
            image_token_id=GLM["<|image|>"],
            image_end_token_id=GLM["<|end_of_image|>"],
            video_start_token_id=GLM["<|begin_of_video|>"],
            video_token_id=GLM["<|video|>"],
            video_end_token_id=GLM["<|end_of_video|>"],
        ),
        _glm4v_processor,
        {"image": [GLM["<|begin_of_image|>"], GLM["<|image|>"], GLM["<|end_of_image|>"]]},
        marks=GLM_MARKS,
    ),
    # A gated delta net beside attention: in bfloat16 alone.
    "qwen3_5_vl": Multimodal(
        image_text(
            "Qwen3_5Config",
            text_config("qwen3_5_text")
            | DELTA_NET["qwen3_5"].config
            | _mrope(mrope_interleaved=True, mrope_section=[4, 2, 2], partial_rotary_factor=0.25),
            _qwen_vision(num_position_embeddings=64),
            **QWEN_TOKENS,
        ),
        _qwen_processor("Qwen3VLProcessor", 16),
        {"image": QWEN_PROMPTS["image"]},
        names=QWEN_NAMES,
        engine={"dtype": "bfloat16", "enable_prefix_caching": False},
    ),
    # Images and sounds.
    "qwen2_5_omni": Multimodal(
        ModelSpec(
            "Qwen2_5OmniConfig",
            {
                "thinker_config": {
                    "text_config": text_config(
                        "qwen2_5_omni_text", vocab_size=NUM_TOKENS + len(SOUND_MARKS), **_mrope(type="mrope")
                    ),
                    "vision_config": {"model_type": "qwen2_5_omni_vision_encoder"}
                    | _qwen_vision(fullatt_block_indexes=[1], window_size=56),
                    "audio_config": _omni_audio("qwen2_5_omni_audio_encoder"),
                    "audio_token_index": mark(AUDIO),
                    "image_token_index": mark(IMAGE),
                    "video_token_index": mark(VIDEO),
                    "vision_start_token_id": mark(BEGIN),
                    "vision_end_token_id": mark(END),
                    "audio_start_token_id": NUM_TOKENS,
                    "audio_end_token_id": NUM_TOKENS + 1,
                },
                "enable_audio_output": False,
            },
            model_class="AutoModelForMultimodalLM",
        ),
        _omni_processor("Qwen2_5OmniProcessor", 14),
        {"image": QWEN_PROMPTS["image"], "audio": [NUM_TOKENS, mark(AUDIO), NUM_TOKENS + 1]},
        names=SOUND_NAMES,
        marks=SOUND_MARKS,
        architecture="Qwen2_5OmniModel",
    ),
    "qwen3_omni_moe": Multimodal(
        ModelSpec(
            "Qwen3OmniMoeConfig",
            {
                "thinker_config": {
                    "text_config": text_config(
                        "qwen3_omni_moe_text",
                        vocab_size=NUM_TOKENS + len(SOUND_MARKS),
                        moe_intermediate_size=96,
                        num_experts=4,
                        num_experts_per_tok=2,
                        **_mrope(mrope_interleaved=True),
                    ),
                    "vision_config": {"model_type": "qwen3_omni_moe_vision_encoder"}
                    | _qwen_vision(
                        image_size=128,
                        apply_vit_abs_pos_embed=True,
                        num_position_embeddings=64,
                        deepstack_visual_indexes=[0, 1],
                    ),
                    "audio_config": _omni_audio("qwen3_omni_moe_audio_encoder", downsample_hidden_size=32),
                    "audio_token_id": mark(AUDIO),
                    "image_token_id": mark(IMAGE),
                    "video_token_id": mark(VIDEO),
                    "vision_start_token_id": mark(BEGIN),
                    "vision_end_token_id": mark(END),
                    "audio_start_token_id": NUM_TOKENS,
                    "audio_end_token_id": NUM_TOKENS + 1,
                },
                "enable_audio_output": False,
            },
            model_class="AutoModelForMultimodalLM",
        ),
        _omni_processor("Qwen3OmniMoeProcessor", 16),
        {"image": QWEN_PROMPTS["image"], "audio": [NUM_TOKENS, mark(AUDIO), NUM_TOKENS + 1]},
        names=SOUND_NAMES,
        marks=SOUND_MARKS,
    ),
}
