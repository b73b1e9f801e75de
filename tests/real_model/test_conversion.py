"""The converted model's tokenizer does what the GGUF's own metadata says."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import regex
from gguf import GGUFReader
from transformers import AutoTokenizer

# How the name of the pre-tokenizer in the GGUF, "smollm", is defined: every digit stands alone, then GPT-2's split.
DIGIT = regex.compile(r"\p{N}|\P{N}+")
GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

TEXTS = [
    "The capital of France is Paris.",
    "In 1984, 3.14159 was about 22/7; call 555-0199 or 1234567890!",
    "x=0x1F; y += 10**12  # tabs\tand   spaces\n\n  indented",
    "naïve café — 東京 2024, Ελλάδα, 🙂🙃",
    "I'll say it's they've can't DON'T we're",
    "<|im_start|>user\nWhat is 12 + 345?<|im_end|>\n<|im_start|>assistant\n",
    " leading space and trailing space ",
]


class ReferenceTokenizer:
    """Byte-level BPE straight from the metadata's tokens, types and merges; slow and plain."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        tokens = metadata["tokenizer.ggml.tokens"]
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ranks = {merge: rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
        types = metadata["tokenizer.ggml.token_type"]
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
        self.special = regex.compile("(" + "|".join(map(regex.escape, control)) + ")")
        self.characters = _byte_characters()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.special.split(text):
            if self.special.fullmatch(part):
                ids.append(self.ids[part])
                continue
            for piece in DIGIT.findall(part):
                for word in GPT2.findall(piece):
                    ids += [self.ids[token] for token in self.merge(word)]
        return ids

    def merge(self, word: str) -> list[str]:
        """Applies the merge of the lowest rank, leftmost first, until none applies."""
        parts = [self.characters[byte] for byte in word.encode()]
        while True:
            pairs = [f"{left} {right}" for left, right in itertools.pairwise(parts)]
            known = [(self.ranks[pair], i) for i, pair in enumerate(pairs) if pair in self.ranks]
            if not known:
                return parts
            _, i = min(known)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: chr(byte) for byte in printable}
    stand_ins |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_ins[byte] for byte in range(256)]


@pytest.fixture(scope="module")
def metadata(real_model: Path) -> dict[str, Any]:
    (gguf,) = real_model.parent.glob("*.gguf")
    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids(real_model: Path, metadata: dict[str, Any], text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    ids = tokenizer.encode(text)
    assert ids == ReferenceTokenizer(metadata).encode(text)
    assert tokenizer.decode(ids) == text


def test_chat_template(real_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    chat = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
