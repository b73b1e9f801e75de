"""OpenAI clients of a server under test, many at a time, that say which tokens they got and when."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAIError

MODEL = "tiny"
"""As `--served-model-name` has it."""


def new_client(url: str, timeout: float) -> AsyncOpenAI:
    """A client that does not ask twice. Close it, or use it as an asynchronous context manager."""
    # Connections are not used again: the server may close one that idles just when it is.
    many = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    http = httpx.AsyncClient(limits=many, timeout=timeout, trust_env=False)
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, http_client=http)


@dataclass
class Reply:
    """What came of one request. Times are those of `time.monotonic`."""

    asked_at: float
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    """When each piece of a stream came; of an answer in one piece, when it was there."""
    ended_at: float | None = None
    error: str | None = None
    hung_up: bool = False
    """Whether the client left before the end."""

    def take(self, piece: Any) -> None:
        """Add a piece of a stream, or an answer in one piece."""
        self.token_ids += piece.choices[0].token_ids or []
        self.arrivals.append(time.monotonic())

    @property
    def is_answered(self) -> bool:
        return self.ended_at is not None and self.error is None and not self.hung_up

    @property
    def longest_pause(self) -> tuple[float, float]:
        """Seconds without a piece of the stream between its first and its last, and when they began."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return max(((after - before, before) for before, after in pairs), default=(0.0, self.asked_at))


async def ask(
    client: AsyncOpenAI,
    prompt: list[int],
    max_tokens: int,
    *,
    stream: bool = False,
    hang_up_after: int | None = None,
    seconds_between_reads: float = 0.0,
) -> Reply:
    """Ask for exactly `max_tokens` of the likeliest tokens; whatever happens is in the reply.

    After `hang_up_after` tokens of a stream the client disconnects. It does so too where the task of this call is
    cancelled, and the call returns then.
    """
    reply = Reply(time.monotonic())
    try:
        answer = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0.0,
            stream=stream,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        if not stream:
            reply.take(answer)
            return reply
        async with answer:
            async for piece in answer:
                reply.take(piece)
                if hang_up_after is not None and len(reply.token_ids) >= hang_up_after:
                    reply.hung_up = True
                    break
                if seconds_between_reads:
                    await asyncio.sleep(seconds_between_reads)
    except asyncio.CancelledError:
        reply.hung_up = True
    except (OpenAIError, httpx.HTTPError) as error:
        cause = f" ({error.__cause__!r})" if error.__cause__ is not None else ""
        reply.error = f"{type(error).__name__}: {error}{cause}"
    finally:
        reply.ended_at = time.monotonic()
    return reply
