"""Clients that ask a server questions all the time, and know the answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clients import Reply, ask, new_client
from questions import Question

PATIENCE = 180.0
"""Seconds that a client waits for the next piece of its answer: more than any recovery may take."""

SHARE_STREAMED = 0.6
SHARE_HUNG_UP = 0.1
"""Of the requests, those whose clients leave before the end."""


@dataclass(frozen=True)
class Asked:
    """A question and its reply, once there is nothing more to come."""

    number: int
    question: Question
    streamed: bool
    reply: Reply

    @property
    def failure(self) -> str | None:
        """What is wrong with the reply."""
        expected, got = self.question.answer, self.reply.token_ids
        what = f"request {self.number} ({len(self.question.prompt)} + {len(expected)} tokens"
        what += ", streamed)" if self.streamed else ")"
        if self.reply.error is not None:
            return f"{what}: error after {len(got)} tokens: {self.reply.error}"
        if self.reply.hung_up:
            expected = expected[: len(got)]
        if got != expected:
            pairs = enumerate(zip(got, expected, strict=False))
            where = next((index for index, pair in pairs if pair[0] != pair[1]), min(len(got), len(expected)))
            return f"{what}: {len(got)} tokens, and from token {where} on not those of the undisturbed run"
        return None


class Traffic:
    """As many users as asked for, each with a question at a time, and bursts of more. Use inside one event loop.

    Parameters
    ----------
    questions
        Drawn from at random by `seed`.
    """

    def __init__(self, url: str, questions: Sequence[Question], seed: int) -> None:
        self.replies: list[Asked] = []
        self._url, self._questions = url, questions
        self._rng = random.Random(seed)
        self._asked = 0
        self._stopping = asyncio.Event()
        self._users: list[asyncio.Task[None]] = []
        self._in_flight: set[asyncio.Task[Reply]] = set()
        self._bursts: set[asyncio.Task[Asked]] = set()

    async def __aenter__(self) -> Traffic:
        self._client = new_client(self._url, PATIENCE)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stopping.set()
        tasks: list[asyncio.Task[Any]] = [*self._users, *self._bursts, *self._in_flight]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    @property
    def failures(self) -> list[str]:
        """What is wrong with any reply so far."""
        return [failure for asked in self.replies if (failure := asked.failure) is not None]

    @property
    def num_in_flight(self) -> int:
        """Requests that have no whole answer yet."""
        return len(self._in_flight)

    def start_users(self, count: int) -> None:
        """Let users ask one question after the other."""
        self._users += [
            asyncio.create_task(self._user(random.Random(self._rng.random()))) for _ in range(count)
        ]

    def burst(self, count: int) -> None:
        """Ask so many questions at once, without waiting."""
        for _ in range(count):
            task = asyncio.create_task(self._ask(self._rng))
            self._bursts.add(task)
            task.add_done_callback(self._bursts.discard)

    def hang_up(self, count: int) -> int:
        """Let the clients of so many requests that are in flight leave; returns how many there were."""
        leaving = self._rng.sample(sorted(self._in_flight, key=id), min(count, len(self._in_flight)))
        for task in leaving:
            task.cancel()
        return len(leaving)

    async def probe(self, deadline: float) -> Asked:
        """Ask a short question now. Raises TimeoutError where it is not answered within `deadline` seconds."""
        shortest = min(self._questions, key=lambda question: len(question.prompt) + len(question.answer))
        asking = asyncio.create_task(self._reply(shortest, streamed=False))
        # Not `asyncio.wait_for`: a request that is cancelled returns, as one whose client left.
        await asyncio.wait((asking,), timeout=deadline)
        if not asking.done():
            asking.cancel()
            await asking
            raise TimeoutError
        return asking.result()

    async def finish_bursts(self) -> None:
        """Wait for the answers to all bursts."""
        await asyncio.gather(*self._bursts)

    async def finish(self) -> None:
        """Let no user ask again, and wait for the answers that are due."""
        self._stopping.set()
        await asyncio.gather(*self._users, *self._bursts)

    async def _user(self, rng: random.Random) -> None:
        while not self._stopping.is_set():
            asked = await self._ask(rng)
            await asyncio.sleep(1.0 if asked.reply.error else rng.uniform(0.0, 0.2))

    async def _ask(self, rng: random.Random) -> Asked:
        question = rng.choice(self._questions)
        streamed = rng.random() < SHARE_STREAMED
        leaves = streamed and rng.random() < SHARE_HUNG_UP / SHARE_STREAMED
        after = rng.randint(1, len(question.answer)) if leaves else None
        return await self._reply(question, streamed=streamed, hang_up_after=after)

    async def _reply(self, question: Question, *, streamed: bool, hang_up_after: int | None = None) -> Asked:
        number, self._asked = self._asked, self._asked + 1
        task = asyncio.create_task(
            ask(
                self._client,
                question.prompt,
                len(question.answer),
                stream=streamed,
                hang_up_after=hang_up_after,
            )
        )
        self._in_flight.add(task)
        try:
            reply = await task
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            now = time.monotonic()  # before it began
            reply = Reply(now, ended_at=now, hung_up=True)
        finally:
            self._in_flight.discard(task)
        asked = Asked(number, question, streamed, reply)
        self.replies.append(asked)
        return asked
