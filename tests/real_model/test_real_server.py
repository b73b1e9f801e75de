"""`vllm serve --executor lamina` answers as stock `vllm serve` does, and leaves nothing behind when it stops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI
from server import VllmServer

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a short sentence about the sea.",
]

# float32, for exact equality. Lamina runs as a user gets it without further options, compiled; stock vLLM is eager,
# which gives the same tokens and starts sooner.
COMMON = ("--dtype", "float32", "--max-model-len", "2048", "--gpu-memory-utilization", "0.2")
STOCK = ("--enforce-eager", "--kv-cache-memory-bytes", str(512 << 20))
LAMINA = ("--executor", "lamina", "--lamina-memory", "512MiB")


@dataclass(frozen=True)
class Outcome:
    """A server's answers to the questions, and the temporary files that it left."""

    whole: list[str]
    streamed: list[str]
    temporary_files: set[str]


def _run(model: str, directory: Path, *args: str) -> Outcome:
    directory.mkdir()
    name = "SmolLM2"
    with VllmServer(model, "--served-model-name", name, *COMMON, *args, directory=directory) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60, max_retries=0)
        whole, streamed = [], []
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            options = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 48}
            answer = client.chat.completions.create(**options)
            whole.append(answer.choices[0].message.content)
            chunks = client.chat.completions.create(**options, stream=True)
            streamed.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    return Outcome(whole, streamed, server.temporary_files())


@pytest.mark.timeout(1000)
def test_same_answers(real_model: Path, tmp_path: Path) -> None:
    stock = _run(str(real_model), tmp_path / "stock", *STOCK)
    lamina = _run(str(real_model), tmp_path / "lamina", *LAMINA)
    assert "Paris" in stock.whole[0]
    assert stock.streamed == stock.whole
    assert lamina.whole == stock.whole
    assert lamina.streamed == stock.whole
    assert lamina.temporary_files <= stock.temporary_files  # vLLM leaves some itself
