"""What a small random multimodal model is made of: marks in a prompt, a processor, parts of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from model_specs import MAX_POSITION, VOCAB_SIZE, ModelSpec
from models import RANDOM, TOKENS

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

    ``names`` are attributes of the tokenizer, ``marks`` further special tokens of it, behind `MARKS`. ``architecture``
    is what vLLM calls it where that is not transformers' name, and ``engine`` are options that it needs. ``renamed``
    maps parts of weights' names as transformers saves them to those that vLLM finds; those that end with one of
    ``transposed`` are saved with their last two dimensions swapped.
    """

    spec: ModelSpec
    processor: Callable[[Any], Any]
    prompts: dict[str, list[int]]
    names: dict[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    architecture: str = ""
    engine: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    needs_torchvision: bool = True

    @property
    def caches_prefixes(self) -> bool:
        """Whether its engines have a prefix cache."""
        return bool(self.engine.get("enable_prefix_caching", True))


def text_config(model_type: str, **config: Any) -> dict[str, Any]:
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


def vision_config(model_type: str, **config: Any) -> dict[str, Any]:
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


VISION_MODEL = {"vision_tower.": "vision_tower.vision_model."}
"""See `Multimodal.renamed`."""


def image_text(
    config_class: str, text_config: dict[str, Any], vision_config: dict[str, Any], **config: Any
) -> ModelSpec:
    """A model of texts with images."""
    return ModelSpec(
        config_class,
        {"text_config": text_config, "vision_config": vision_config} | config,
        model_class="AutoModelForImageTextToText",
    )


def own_marks(names: tuple[str, ...]) -> dict[str, int]:
    """The ids of a model's further special tokens, see `Multimodal.marks`."""
    return {name: NUM_TOKENS + index for index, name in enumerate(names)}
