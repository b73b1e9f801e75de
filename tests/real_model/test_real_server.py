"""`vllm serve --executor lamina` answers as stock vLLM does, and leaves nothing behind when it stops."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import Engines
from jobs import Job, Phase, Request
from openai import OpenAI
from server import VllmServer
from transformers import AutoTokenizer
from workloads import greedy

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a short sentence about the sea.",
]
MAX_TOKENS = 48

# float32, for exact equality. Lamina runs as a user gets it without further options, compiled; stock vLLM is eager,
# which gives the same tokens and starts sooner.
LAMINA = ("--dtype", "float32", "--max-model-len", "2048", "--gpu-memory-utilization", "0.2")
LAMINA += ("--executor", "lamina", "--lamina-memory", "512MiB")
MODEL = "SmolLM2"


@pytest.mark.timeout(1000)
def test_same_answers(engines: Engines, real_model: Path, tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    prompts = [
        tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        for chat in chats
    ]
    phase = Phase("questions", [Request(tokens, greedy(MAX_TOKENS, ignore_eos=False)) for tokens in prompts])
    job = Job(str(real_model), [phase], {"max_model_len": 2048}, kv_memory_mib=512)
    stock = [request.completions[0].text for request in engines.run(job).phases[0].requests]
    assert "Paris" in stock[0]

    with VllmServer(str(real_model), "--served-model-name", MODEL, *LAMINA, directory=tmp_path) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60, max_retries=0)
        for chat, expected in zip(chats, stock, strict=True):
            options = {"model": MODEL, "messages": chat, "temperature": 0, "max_tokens": MAX_TOKENS}
            answer = client.chat.completions.create(**options)
            assert answer.choices[0].message.content == expected
            chunks = client.chat.completions.create(**options, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    # Sockets between vLLM's processes, and where its workers found each other: stock vLLM leaves them too.
    assert server.temporary_files() <= {"UUID", "vllm_dist_UUID"}
