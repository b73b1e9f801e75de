"""Loses an attention worker while a server generates."""

from __future__ import annotations

from collections.abc import Callable

from openai import OpenAI
from server import VllmServer

MAX_TOKENS = 1500


def lose_while_generating(server: VllmServer, model: str, lose: Callable[[], None]) -> str:
    """The server's log, after a stream that went on to its end in spite of the loss."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=120, max_retries=0)
    stream = client.completions.create(
        model=model, prompt=[5] * 200, max_tokens=MAX_TOKENS, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(5):
        next(stream)
    lose()
    reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
    assert reasons[-1] == "length"
    return server.log_file.read_text(errors="replace")
