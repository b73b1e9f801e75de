"""Further multimodal models, by what they do with an image's tokens, with windows, or with latent attention."""

from __future__ import annotations

from typing import Any

from image_models import PINPOINTS, images_in_squares, pixtral_images
from model_specs import CHUNKED, FULL, LATENT, PLAIN_ROTARY, SLIDING, ModelSpec
from models import RANDOM
from multimodal_spec import (
    AUDIO,
    BEGIN,
    END,
    IMAGE,
    NUM_TOKENS,
    VIDEO,
    VISION_MODEL,
    Multimodal,
    image_text,
    mark,
    own_marks,
    text_config,
    vision_config,
)

IDEFICS_MARKS = (
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
LLAMA4_MARKS = tuple(
    f"<|{name}|>"
    for name in ("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator")
)
LLAMA4 = own_marks(LLAMA4_MARKS)
GEMMA4_MARKS = ("<|video|>",)


def _internvl(tokenizer: Any) -> Any:
    import transformers

    images = transformers.GotOcr2ImageProcessor(
        size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=3
    )
    videos = transformers.InternVLVideoProcessor(size={"height": 56, "width": 56})
    return transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=4)


def _cohere2_vision(tokenizer: Any) -> Any:
    import transformers

    images = transformers.Cohere2VisionImageProcessor(
        size={"height": 56, "width": 56}, patch_size=2, max_patches=3
    )
    return transformers.Cohere2VisionProcessor(images, tokenizer)


def _idefics3(tokenizer: Any) -> Any:
    import transformers

    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}
    )
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)


def _pixtral(tokenizer: Any) -> Any:
    import transformers

    return transformers.PixtralProcessor(
        pixtral_images(),
        tokenizer,
        patch_size=14,
        image_token=IMAGE,
        image_break_token="<break>",
        image_end_token=END,
    )


def _llama4(tokenizer: Any) -> Any:
    import transformers

    images = transformers.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
    return transformers.Llama4Processor(images, tokenizer, patch_size=14)


def _gemma4(tokenizer: Any) -> Any:
    import transformers

    images = transformers.Gemma4ImageProcessor(max_soft_tokens=70, patch_size=4)
    videos = transformers.Gemma4VideoProcessor(max_soft_tokens=70, patch_size=4)
    sounds = transformers.Gemma4AudioFeatureExtractor()
    return transformers.Gemma4Processor(sounds, images, tokenizer, videos, image_seq_length=70)


def _kimi_k25(tokenizer: Any) -> Any:
    from vllm.transformers_utils.processors.kimi_k25_vision_fused import KimiK25FusedVisionProcessor

    return KimiK25FusedVisionProcessor(
        {
            "patch_size": 14,
            "merge_kernel_size": 2,
            "temporal_merge_kernel_size": 4,
            "in_patch_limit": 256,
            "in_patch_limit_each_frame": 64,
            "in_patch_limit_video": 256,
            "patch_limit_on_one_side": 16,
            "fixed_output_tokens": None,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
    )


def _granite4_vision(tokenizer: Any) -> Any:
    import transformers

    return transformers.Granite4VisionProcessor(
        images_in_squares(height=56, width=56),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        downsample_rate="1/2",
    )


def _lighton_ocr(tokenizer: Any) -> Any:
    import transformers

    return transformers.LightOnOcrProcessor(pixtral_images(), tokenizer)


def _lfm2_vl(tokenizer: Any) -> Any:
    import transformers

    images = transformers.Lfm2VlImageProcessor(
        encoder_patch_size=14,
        tile_size=56,
        max_tiles=4,
        min_image_tokens=4,
        max_image_tokens=16,
        max_num_patches=64,
    )
    return transformers.Lfm2VlProcessor(images, tokenizer)


def _gemma4_spec(**config: Any) -> ModelSpec:
    return image_text(
        "Gemma4Config",
        text_config(
            "gemma4_text",
            vocab_size=NUM_TOKENS + len(GEMMA4_MARKS),
            num_hidden_layers=6,
            head_dim=64,
            global_head_dim=128,
            sliding_window=32,
            layer_types=[SLIDING, SLIDING, FULL] * 2,
            vocab_size_per_layer_input=NUM_TOKENS + len(GEMMA4_MARKS),
            hidden_size_per_layer_input=32,
            **config,
        ),
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 4,
            "position_embedding_size": 256,
            "default_output_length": 70,
        }
        | RANDOM,
        audio_config=None,
        boi_token_id=mark(BEGIN),
        eoi_token_id=mark(END),
        image_token_id=mark(IMAGE),
        video_token_id=NUM_TOKENS,
    )


GEMMA4_NAMES = {
    "boi_token": BEGIN,
    "eoi_token": END,
    "image_token": IMAGE,
    "boa_token": BEGIN,
    "eoa_token": END,
    "audio_token": AUDIO,
}

FURTHER: dict[str, Multimodal] = {
    # An image in tiles.
    "internvl": Multimodal(
        image_text(
            "InternVLConfig",
            text_config("qwen2"),
            {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [56, 56],
                "patch_size": [14, 14],
            }
            | RANDOM,
            image_token_id=mark(IMAGE),
            image_seq_length=4,
        ),
        _internvl,
        {"image": [mark(IMAGE)], "video": [mark(VIDEO)]},
        names={
            "start_image_token": BEGIN,
            "end_image_token": END,
            "context_image_token": IMAGE,
            "video_token": VIDEO,
        },
    ),
    # Windows and full layers.
    "cohere2_vision": Multimodal(
        image_text(
            "Cohere2VisionConfig",
            text_config(
                "cohere2",
                head_dim=64,
                num_hidden_layers=4,
                sliding_window=32,
                layer_types=[SLIDING, SLIDING, SLIDING, FULL],
                tie_word_embeddings=True,
            ),
            vision_config("siglip_vision_model", vision_use_head=False),
            image_token_id=mark(IMAGE),
            alignment_intermediate_size=128,
            tie_word_embeddings=True,
        ),
        _cohere2_vision,
        {"image": [mark(IMAGE)]},
        names={"boi_token": BEGIN, "eoi_token": END, "image_token": IMAGE, "img_line_break_token": "<break>"},
        renamed=VISION_MODEL,
    ),
    # An image as a whole and in squares, each between tokens of the text.
    "idefics3": Multimodal(
        image_text(
            "Idefics3Config",
            text_config("llama", head_dim=64, vocab_size=NUM_TOKENS + len(IDEFICS_MARKS)),
            vision_config("idefics3_vision"),
            image_token_id=mark(IMAGE),
            pad_token_id=0,
        ),
        _idefics3,
        {"image": [mark(IMAGE)]},
        marks=IDEFICS_MARKS,
    ),
    "pixtral": Multimodal(
        image_text(
            "LlavaConfig",
            text_config("mistral", head_dim=64, sliding_window=None),
            vision_config("pixtral", image_size=112, head_dim=32),
            image_token_index=mark(IMAGE),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_seq_length=1,
        ),
        _pixtral,
        {"image": [mark(IMAGE)]},
    ),
    # Chunked local attention.
    "llama4_vision": Multimodal(
        image_text(
            "Llama4Config",
            text_config(
                "llama4_text",
                vocab_size=NUM_TOKENS + len(LLAMA4_MARKS),
                head_dim=64,
                intermediate_size_mlp=384,
                num_hidden_layers=4,
                attention_chunk_size=128,
                layer_types=[CHUNKED, CHUNKED, CHUNKED, FULL],
                no_rope_layers=[1, 1, 1, 0],
                moe_layers=[],
                interleave_moe_layer_step=0,
            ),
            {
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            }
            | RANDOM,
            boi_token_index=LLAMA4["<|image_start|>"],
            eoi_token_index=LLAMA4["<|image_end|>"],
            image_token_index=LLAMA4["<|patch|>"],
        ),
        _llama4,
        {"image": [LLAMA4["<|image|>"]]},
        marks=LLAMA4_MARKS,
    ),
    # Windows and full layers of other heads; images of any size.
    "gemma4_images": Multimodal(
        _gemma4_spec(),
        _gemma4,
        {"image": [mark(IMAGE)]},
        names=GEMMA4_NAMES,
        marks=GEMMA4_MARKS,
    ),
    # The same, whose images' tokens see each other whole in layers with a window, which an image is longer than.
    "gemma4_whole": Multimodal(
        _gemma4_spec(use_bidirectional_attention="vision"),
        _gemma4,
        {"image": [mark(IMAGE)]},
        names=GEMMA4_NAMES,
        marks=GEMMA4_MARKS,
        engine={"limit_mm_per_prompt": {"video": 0}},
    ),
    # Kimi K2.5: latent attention.
    "kimi_k25": Multimodal(
        image_text(
            "Kimi_K25Config",
            text_config("deepseek_v3", vocab_size=NUM_TOKENS + 1) | LATENT["deepseek_v3"].config,
            {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
            projection_hidden_size=64,
            image_token_id=NUM_TOKENS,
            video_token_id=mark(VIDEO),
            vision_start_token_id=mark(BEGIN),
            vision_end_token_id=mark(END),
        ),
        _kimi_k25,
        {"vision_chunk": [NUM_TOKENS]},
        marks=("<|media_pad|>",),
        architecture="KimiK25ForConditionalGeneration",
        engine={"compilation_config": PLAIN_ROTARY},
        renamed={
            "language_model.model.blocks.": "language_model.model.layers.",
            "model.mm_projector.": "mm_projector.",
            "encoder.patch_embed.": "patch_embed.",
        },
    ),
    # Short convolutions beside attention.
    "lfm2_vl": Multimodal(
        image_text(
            "Lfm2VlConfig",
            text_config(
                "lfm2",
                num_hidden_layers=4,
                layer_types=["conv", "full_attention"] * 2,
                conv_dim=256,
                block_dim=256,
            ),
            vision_config("siglip2_vision_model", num_patches=16, vision_use_head=False),
            image_token_id=mark(IMAGE),
            projector_hidden_size=64,
        ),
        _lfm2_vl,
        {"image": [mark(IMAGE)]},
        engine={"compilation_config": PLAIN_ROTARY, "enable_prefix_caching": False},
        renamed=VISION_MODEL,
        names={
            "image_token": IMAGE,
            "image_start_token": BEGIN,
            "image_end_token": END,
            "image_thumbnail": "<break>",
        },
    ),
    # Features are added behind the layers of the decoder, as in Qwen 3, and in as many other ways.
    "granite4_vision": Multimodal(
        image_text(
            "Granite4VisionConfig",
            text_config("granite4_vision_text", num_hidden_layers=6),
            vision_config("siglip_vision_model", vision_use_head=False),
            image_token_index=mark(IMAGE),
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=4,
            downsample_rate="1/2",
            deepstack_layer_map=[[-2, 0], [-1, 1]],
            spatial_target_layers=[2, 3, 4, 5],
            vision_feature_select_strategy="full",
        ),
        _granite4_vision,
        {"image": [mark(IMAGE)]},
        renamed=VISION_MODEL,
    ),
    "lighton_ocr": Multimodal(
        image_text(
            "LightOnOcrConfig",
            text_config("qwen3", head_dim=64),
            vision_config("pixtral", image_size=112, head_dim=32),
            image_token_id=mark(IMAGE),
            tie_word_embeddings=False,
        ),
        _lighton_ocr,
        {"image": [mark(IMAGE)]},
        names={"image_token": IMAGE, "image_break_token": "<break>", "image_end_token": END},
    ),
}
