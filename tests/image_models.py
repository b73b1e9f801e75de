"""Multimodal models with images whose positions are those of their tokens."""

from __future__ import annotations

from typing import Any

from model_specs import FULL, SLIDING
from multimodal_spec import (
    BEGIN,
    END,
    IMAGE,
    VISION_MODEL,
    Multimodal,
    image_text,
    mark,
    text_config,
    vision_config,
)

PINPOINTS = [[56, 112], [112, 56], [112, 112]]
"""Sizes that an image is cut into squares of 56 for."""


def _llava_processor(tokenizer: Any) -> Any:
    import transformers

    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def images_in_squares(**size: int) -> Any:
    """Gives an image as a whole, of this size, and in squares of 56, see `PINPOINTS`."""
    import transformers

    return transformers.LlavaNextImageProcessor(
        size=size, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )


def _llava_next_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.LlavaNextProcessor(
        images_in_squares(shortest_edge=56),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def _gemma3_processor(tokenizer: Any) -> Any:
    import transformers

    images = transformers.Gemma3ImageProcessor(size={"height": 112, "width": 112})
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=16)


def pixtral_images() -> Any:
    """Leaves images as large as they are, up to 112 on a side."""
    import transformers

    return transformers.PixtralImageProcessor(
        size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
    )


def _mistral3_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.PixtralProcessor(
        pixtral_images(),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        image_token=IMAGE,
        image_break_token="<break>",
        image_end_token=END,
    )


IMAGES: dict[str, Multimodal] = {
    # 16 tokens for an image.
    "llava": Multimodal(
        image_text(
            "LlavaConfig",
            text_config("llama", head_dim=64),
            vision_config("clip_vision_model", projection_dim=64),
            image_token_index=mark(IMAGE),
            image_seq_length=16,
        ),
        _llava_processor,
        {"image": [mark(IMAGE)]},
        renamed=VISION_MODEL,
    ),
    # An image as a whole and in squares, with a token at the end of each row.
    "llava_next": Multimodal(
        image_text(
            "LlavaNextConfig",
            text_config("llama", head_dim=64),
            vision_config("clip_vision_model", projection_dim=64),
            image_token_index=mark(IMAGE),
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=16,
        ),
        _llava_next_processor,
        {"image": [mark(IMAGE)]},
        renamed=VISION_MODEL,
    ),
    # An image's 16 tokens see each other whole, in layers with a window and in those without.
    "gemma3_vision": Multimodal(
        image_text(
            "Gemma3Config",
            text_config(
                "gemma3_text",
                num_hidden_layers=4,
                head_dim=64,
                sliding_window=32,
                layer_types=[SLIDING, SLIDING, SLIDING, FULL],
                query_pre_attn_scalar=64,
            ),
            vision_config("siglip_vision_model", image_size=112, vision_use_head=False),
            mm_tokens_per_image=16,
            boi_token_index=mark(BEGIN),
            eoi_token_index=mark(END),
            image_token_index=mark(IMAGE),
        ),
        _gemma3_processor,
        {"image": [mark(BEGIN)]},
        names={"boi_token": BEGIN, "eoi_token": END, "image_token": IMAGE},
        renamed=VISION_MODEL,
    ),
    # Images of any size, in rows that end with a token of the text.
    "mistral3": Multimodal(
        image_text(
            "Mistral3Config",
            text_config("mistral", head_dim=64, sliding_window=None),
            vision_config("pixtral", image_size=112, head_dim=32),
            image_token_index=mark(IMAGE),
        ),
        _mistral3_processor,
        {"image": [mark(IMAGE)]},
    ),
}
