"""Makes the small random models of `model_specs` and `hybrid_specs` in Hugging Face format, tokenizers and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybrid_specs import DELTA_NET, HYBRID
from model_specs import LATENT, LAYERED, OTHERS, SUPPORTED, UNSUPPORTED, VOCAB_SIZE, ModelSpec

SPECS = SUPPORTED | OTHERS | LAYERED | LATENT | HYBRID | DELTA_NET | UNSUPPORTED
"""By name, but for the multimodal models."""

NUM_SPECIAL_TOKENS = 4  # <pad> <s> </s> <unk>
EOS = 2

# Standard deviation of every weight. At hidden size 256 it gives logits a standard deviation of about 1.6, hence
# typical top-2 margins of a few tenths, and attention scores one of about 2.5, hence attention that is not uniform.
_WEIGHT_STD = 0.1


def create_model(spec: ModelSpec, directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Writes the model with random float32 weights, and a tokenizer, to `directory`.

    `overrides` replace fields of the configuration. Returns `directory`. The weights depend on `seed` and the
    configuration alone.
    """
    import transformers

    model = random_model(spec, seed, vocab_size=VOCAB_SIZE, **overrides)
    model.save_pretrained(directory)
    create_tokenizer(directory)
    if spec.config_class == "WhisperConfig":
        transformers.WhisperFeatureExtractor().save_pretrained(directory)
    return directory


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
RANDOM = {"initializer_range": _WEIGHT_STD}


def random_model(spec: ModelSpec, seed: int = 0, **overrides: Any) -> Any:
    """The model of transformers, with random float32 weights."""
    import torch
    import transformers

    torch.manual_seed(seed)
    fields = TOKENS | RANDOM | {"tie_word_embeddings": False} | spec.config | overrides
    config = getattr(transformers, spec.config_class)(**fields)
    model = getattr(transformers, spec.model_class).from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers initialises these to zero, which would hide a forgotten bias
            torch.nn.init.normal_(parameter, std=_WEIGHT_STD)
        if (
            config.tie_word_embeddings and ".post_" in name
        ):  # or the embedding outweighs the layers: one token for ever
            torch.nn.init.constant_(parameter, 8.0)
    return model


def create_tokenizer(directory: Path, marks: tuple[str, ...] = (), **names: str) -> Any:
    """Writes a tokenizer of `VOCAB_SIZE` tokens: special tokens, one per byte, and made-up words for the rest.

    Encoding yields byte tokens only; the words give random token ids a text. `marks` are further special tokens behind
    these, and `names` attributes of the tokenizer that are some of them. Returns the tokenizer.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    syllables = [consonant + vowel for consonant in "bdfghklmnprstvwz" for vowel in "aeiou"]
    words = (f"Ġ{first}{second}" for first in syllables for second in syllables)
    tokens += [next(words) for _ in range(VOCAB_SIZE - len(tokens))]

    tokens += marks
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens(list(marks))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[EOS],
        unk_token=special[3],
        **({"extra_special_tokens": names} if names else {}),
    )
    made.save_pretrained(directory)
    return made


# Modules of Llama that a LoRA adapter may change.
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")


def create_adapter(model: Path, directory: Path, rank: int, modules: tuple[str, ...], seed: int) -> Path:
    """Writes a LoRA adapter in PEFT's format, with random float32 weights, for a Llama made by `create_model`.

    It is as large as the weights that it changes, so that tokens depend on it. Returns `directory`.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    scale = _WEIGHT_STD**0.5 / rank**0.25
    weights = {}
    with safe_open(model / "model.safetensors", "pt") as base:
        for name in base.keys():  # noqa: SIM118 - it is no mapping
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in modules:
                rows, columns = base.get_slice(name).get_shape()
                a = torch.randn(rank, columns, generator=generator) * scale
                b = torch.randn(rows, rank, generator=generator) * scale
                weights |= {
                    f"base_model.model.{module}.lora_{letter}.weight": w for letter, w in (("A", a), ("B", b))
                }
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules)}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    return directory


class ModelZoo:
    """Creates each model once, on first use, below one directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str) -> str:
        """The directory of the model called `name` in `SPECS`, or of a multimodal one."""
        directory = self._root / name
        if not (directory / "tokenizer.json").exists():
            import multimodal_models

            if name in multimodal_models.MULTIMODAL:
                multimodal_models.create(name, directory)
            else:
                create_model(
                    SPECS[name],
                    directory,
                )
        return str(directory)
