"""Small random multimodal models in Hugging Face format, with the processors of their images, videos and sounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_specs import FULL, MAX_POSITION, SLIDING, VOCAB_SIZE, ModelSpec
from models import RANDOM, TOKENS, create_tokenizer, random_model

IMAGE, VIDEO, AUDIO = "<image>", "<video>", "<audio>"
BEGIN, END = "<begin>", "<end>"
MARKS = (IMAGE, VIDEO, AUDIO, BEGIN, END, "<break>", "\n", "\n\n", "\n\n\n", "\n\n\n\n")
"""Special tokens behind the words."""

NUM_TOKENS = VOCAB_SIZE + len(MARKS)


def mark(token: str) -> int:
    """The id of a special token."""
    return VOCAB_SIZE + MARKS.index(token)


@dataclass(frozen=True)
class Multimodal:
    """A model, what stands in a prompt for one input of each kind, and how its processor is written.

    ``names`` are attributes of the tokenizer, and ``renamed`` maps parts of weights' names as transformers saves them
    to those that vLLM finds.
    """

    spec: ModelSpec
    processor: Callable[[Any], Any]
    prompts: dict[str, list[int]]
    names: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    needs_torchvision: bool = True


def _text(model_type: str, **config: Any) -> dict[str, Any]:
    return (
        {
            "model_type": model_type,
            "vocab_size": NUM_TOKENS,
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": MAX_POSITION,
            "tie_word_embeddings": False,
        }
        | TOKENS
        | RANDOM
        | config
    )


def _vision(model_type: str, **config: Any) -> dict[str, Any]:
    """An encoder of images of 56 pixels on a side, in patches of 14."""
    return (
        {
            "model_type": model_type,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        }
        | RANDOM
        | config
    )


def _qwen_vision(**config: Any) -> dict[str, Any]:
    """An encoder of images of any size, in patches of 14 or 16, of which four make a token."""
    return (
        {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 256}
        | RANDOM
        | config
    )


def _mrope(**more: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]} | more
    }


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


def _gemma3_processor(tokenizer: Any) -> Any:
    import transformers

    images = transformers.Gemma3ImageProcessor(size={"height": 112, "width": 112})
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=16)


def _mistral3_processor(tokenizer: Any) -> Any:
    import transformers

    images = transformers.PixtralImageProcessor(
        size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
    )
    return transformers.PixtralProcessor(
        images,
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        image_token=IMAGE,
        image_break_token="<break>",
        image_end_token=END,
    )


def _qwen2_audio_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.Qwen2AudioProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer)


def _qwen_processor(name: str, patch_size: int) -> Callable[[Any], Any]:
    def processor(tokenizer: Any) -> Any:
        import transformers

        sizes = {"patch_size": patch_size, "merge_size": 2}
        pixels = {"shortest_edge": (2 * patch_size) ** 2, "longest_edge": 64 * (2 * patch_size) ** 2}
        images = transformers.Qwen2VLImageProcessor(size=pixels, **sizes)
        of_videos = "Qwen3VLVideoProcessor" if name == "Qwen3VLProcessor" else "Qwen2VLVideoProcessor"
        videos = getattr(transformers, of_videos)(size=pixels, **sizes)
        return getattr(transformers, name)(images, tokenizer, videos)

    return processor


MULTIMODAL: dict[str, Multimodal] = {
    # 16 tokens for an image.
    "llava": Multimodal(
        ModelSpec(
            "LlavaConfig",
            {
                "text_config": _text("llama", head_dim=64),
                "vision_config": _vision("clip_vision_model", projection_dim=64),
                "image_token_index": mark(IMAGE),
                "image_seq_length": 16,
            },
            model_class="AutoModelForImageTextToText",
        ),
        _llava_processor,
        {"image": [mark(IMAGE)]},
        renamed={"vision_tower.": "vision_tower.vision_model."},
    ),
    # An image's 16 tokens see each other whole, in layers with a window and in those without.
    "gemma3_vision": Multimodal(
        ModelSpec(
            "Gemma3Config",
            {
                "text_config": _text(
                    "gemma3_text",
                    num_hidden_layers=4,
                    head_dim=64,
                    sliding_window=32,
                    layer_types=[SLIDING, SLIDING, SLIDING, FULL],
                    query_pre_attn_scalar=64,
                ),
                "vision_config": _vision("siglip_vision_model", image_size=112, vision_use_head=False),
                "mm_tokens_per_image": 16,
                "boi_token_index": mark(BEGIN),
                "eoi_token_index": mark(END),
                "image_token_index": mark(IMAGE),
            },
            model_class="AutoModelForImageTextToText",
        ),
        _gemma3_processor,
        {"image": [mark(BEGIN)]},
        names={"boi_token": BEGIN, "eoi_token": END, "image_token": IMAGE},
        renamed={"vision_tower.": "vision_tower.vision_model."},
    ),
    # Images of any size, in rows that end with a token of the text.
    "mistral3": Multimodal(
        ModelSpec(
            "Mistral3Config",
            {
                "text_config": _text("mistral", head_dim=64, sliding_window=None),
                "vision_config": _vision("pixtral", image_size=112, head_dim=32),
                "image_token_index": mark(IMAGE),
            },
            model_class="AutoModelForImageTextToText",
        ),
        _mistral3_processor,
        {"image": [mark(IMAGE)]},
    ),
    "qwen2_audio": Multimodal(
        ModelSpec(
            "Qwen2AudioConfig",
            {
                "text_config": _text("qwen2"),
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
        ModelSpec(
            "Qwen2VLConfig",
            {
                "text_config": _text("qwen2_vl_text", **_mrope(type="mrope")),
                "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 256, "num_heads": 2} | RANDOM,
            }
            | QWEN_TOKENS,
            model_class="AutoModelForImageTextToText",
        ),
        _qwen_processor("Qwen2VLProcessor", 14),
        QWEN_PROMPTS,
        names=QWEN_NAMES,
    ),
    "qwen2_5_vl": Multimodal(
        ModelSpec(
            "Qwen2_5_VLConfig",
            {
                "text_config": _text("qwen2_5_vl_text", **_mrope(type="mrope")),
                "vision_config": _qwen_vision(fullatt_block_indexes=[1], window_size=56),
            }
            | QWEN_TOKENS,
            model_class="AutoModelForImageTextToText",
        ),
        _qwen_processor("Qwen2_5_VLProcessor", 14),
        QWEN_PROMPTS,
        names=QWEN_NAMES,
    ),
    # What the encoder's first layers say is added to the hidden states behind the first layers of the decoder.
    "qwen3_vl": Multimodal(
        ModelSpec(
            "Qwen3VLConfig",
            {
                "text_config": _text("qwen3_vl_text", head_dim=64, **_mrope(mrope_interleaved=True)),
                "vision_config": _qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            }
            | QWEN_TOKENS,
            model_class="AutoModelForImageTextToText",
        ),
        _qwen_processor("Qwen3VLProcessor", 16),
        {"image": QWEN_PROMPTS["image"]},
        names=QWEN_NAMES,
    ),
}


def transformers_model(name: str, seed: int = 0) -> Any:
    """The model as transformers has it, with the weights that `create` writes."""
    return random_model(MULTIMODAL[name].spec, seed)


def create(name: str, directory: Path) -> None:
    """Writes a model of `MULTIMODAL`, its tokenizer and its processor."""
    from safetensors.torch import load_file, save_file

    model = MULTIMODAL[name]
    made = transformers_model(name)
    made.save_pretrained(directory)
    if model.renamed:
        file = directory / "model.safetensors"
        weights = load_file(file)
        for old, new in model.renamed.items():
            weights = {key.replace(old, new): value for key, value in weights.items()}
        save_file(weights, file, {"format": "pt"})
    model.processor(create_tokenizer(directory, MARKS, **model.names)).save_pretrained(directory)
