"""Makes small random multimodal models in Hugging Face format, with processors of their images, videos and sounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from further_multimodal import FURTHER
from image_models import IMAGES
from models import create_tokenizer, random_model
from multimodal_spec import MARKS, Multimodal
from qwen_models import QWEN

MULTIMODAL: dict[str, Multimodal] = IMAGES | QWEN | FURTHER


def transformers_model(name: str, seed: int = 0) -> Any:
    """The model as transformers has it, with the weights that `create` writes."""
    return random_model(MULTIMODAL[name].spec, seed)


def create(name: str, directory: Path) -> None:
    """Writes a model of `MULTIMODAL`, its tokenizer and its processor."""
    from safetensors.torch import load_file, save_file

    model = MULTIMODAL[name]
    made = transformers_model(name)
    made.save_pretrained(directory)
    if model.renamed or model.transposed:
        file = directory / "model.safetensors"
        weights = load_file(file)
        for old, new in model.renamed.items():
            weights = {key.replace(old, new): value for key, value in weights.items()}
        weights = {
            key: value.mT.contiguous() if key.endswith(model.transposed) else value
            for key, value in weights.items()
        }
        save_file(weights, file, {"format": "pt"})
    if model.architecture:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [model.architecture]}))
    model.processor(create_tokenizer(directory, MARKS + model.marks, **model.names)).save_pretrained(
        directory
    )
