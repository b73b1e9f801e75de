"""A server of a multimodal model answers as stock vLLM's does, and outlives what cannot be an image."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from media import one
from models import ModelZoo
from multimodal_requests import SHAPES
from PIL import Image
from server import VllmServer

MODEL = "tiny"
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<begin><image><end>{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
OPTIONS = (
    "--dtype",
    "float32",
    "--enforce-eager",
    "--gpu-memory-utilization",
    "0.2",
    "--max-model-len",
    "2048",
)
OPTIONS += ("--served-model-name", MODEL, "--limit-mm-per-prompt", '{"image": 3}')
LAMINA = ("--executor", "lamina", "--lamina-memory", "128MiB", "--lamina-stagger", "always")
MAX_TOKENS = 12
WORDS = 1
"""The question without an input."""
FAULTS = {"a file", "huge", "unreachable"}
"""What vLLM says are its own: it answers 500."""

Part = dict[str, Any]


def encoded(shape: list[int], seed: int) -> str:
    """A random image as a client sends it."""
    file = io.BytesIO()
    one("image", shape, seed).save(file, "png")
    return data_url(file.getvalue())


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def image(url: str) -> Part:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> Part:
    return {"type": "text", "text": words}


FIRST, SECOND, THIRD = (image(encoded(shape, seed)) for seed, shape in enumerate(SHAPES["image"]))
QUESTIONS = [
    [text("What is this? "), FIRST],
    [text("Nothing but words.")],
    [FIRST, text(" and "), SECOND, text(" and ")],
    [THIRD, THIRD, FIRST, text("!" * 300)],
]


def refused() -> dict[str, list[Part]]:
    """What a client may send by mistake, or to do harm."""
    bomb = io.BytesIO()
    Image.new("1", (16_000, 16_000)).save(bomb, "png")
    return {
        "not base64": [image("data:image/png;base64,@@@")],
        "cut off": [image(encoded(SHAPES["image"][0], 0)[:1022])],
        "not an image": [image(data_url(b"words"))],
        "another scheme": [image("ftp://127.0.0.1/image.png")],
        "a file": [image("file:///etc/passwd")],
        "no URL": [image("")],
        "unreachable": [image("http://127.0.0.1:9/image.png")],
        "too many": [FIRST] * 4,
        "huge": [image(data_url(bomb.getvalue()))],
        "a sound": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
    }


def ask(server: VllmServer, content: list[Part], timeout: float = 120, **more: Any) -> httpx.Response:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "logprobs": True,
        "ignore_eos": True,
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body | more, timeout=timeout, trust_env=False)


def give_up(server: VllmServer, content: list[Part], seconds: float) -> None:
    """Send a question and hang up, while its images are loaded, encoded or waited for; or before it is answered."""
    with suppress(httpx.TimeoutException):
        ask(server, content, timeout=seconds, max_tokens=500)


def tokens(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [token["token"] for token in answer.json()["choices"][0]["logprobs"]["content"]]


def streamed(answer: httpx.Response) -> list[str]:
    lines = (line.removeprefix("data: ") for line in answer.text.splitlines() if line)
    pieces = [json.loads(line) for line in lines if line != "[DONE]"]
    return [
        token["token"]
        for piece in pieces
        for choice in piece["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("torchvision") is None, reason="its processor needs torchvision: docs/testing.md"
)
@pytest.mark.timeout(1200)
def test_server(model_zoo: ModelZoo, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)

    @contextmanager
    def serving(name: str, *options: str) -> Iterator[VllmServer]:
        (tmp_path / name).mkdir()
        options = (*OPTIONS, "--chat-template", str(template), *options)
        with VllmServer(model_zoo("qwen2_vl"), *options, directory=tmp_path / name) as server:
            yield server

    bad = refused()
    with serving("stock") as server:
        expected = [tokens(ask(server, content)) for content in QUESTIONS]
        statuses = {what: ask(server, content).status_code for what, content in bad.items()}
    assert {what for what, status in statuses.items() if status != 400} <= FAULTS
    with serving("lamina", *LAMINA) as server:
        for what, content in bad.items():
            assert (what, ask(server, content).status_code) == (what, statuses[what])
            assert tokens(ask(server, QUESTIONS[0])) == expected[0]
        assert [tokens(ask(server, content)) for content in QUESTIONS] == expected
        with ThreadPoolExecutor(12) as pool:
            together = pool.map(lambda content: ask(server, content), [*QUESTIONS, *bad.values()] * 3)
            found = [tokens(answer) for answer in together if answer.status_code == 200]
        assert found == expected * 3
        assert [streamed(ask(server, content, stream=True)) for content in QUESTIONS] == expected
    (file := tmp_path / "image.png").write_bytes(
        base64.b64decode(FIRST["image_url"]["url"].partition(",")[2])
    )
    options = (
        "--allowed-local-media-path",
        str(tmp_path),
        "--mm-processor-cache-gb",
        "0",
        "--api-server-count",
        "2",
    )
    with serving("api servers", *LAMINA, *options) as server:
        assert tokens(ask(server, [QUESTIONS[0][0], image(f"file://{file}")])) == expected[0]
        with ThreadPoolExecutor(12) as pool:
            for seconds in (0.02, 0.05, 0.1, 0.2, 0.4):
                pool.submit(give_up, server, QUESTIONS[3], seconds)
            found = [
                tokens(answer) for answer in pool.map(lambda content: ask(server, content), QUESTIONS * 3)
            ]
        assert found == expected * 3
        assert {ask(server, content).status_code for what, content in bad.items() if what not in FAULTS} == {
            400
        }
        assert ask(server, [image(f"file://{template}")]).status_code == 400
    with serving("words", *LAMINA, "--language-model-only") as server:
        assert ask(server, QUESTIONS[0]).status_code == 400
        assert tokens(ask(server, QUESTIONS[WORDS])) == expected[WORDS]
