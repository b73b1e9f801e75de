"""A server with two lanes and a small pool that is asked for too much: nobody is forgotten, no answer changes."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import openai
import pytest
from clients import MODEL, Reply, ask, new_client
from engines import Engines
from models import ModelZoo
from openai import OpenAI
from questions import Question, ask_stock
from server import VllmServer
from workloads import prompt

MAX_MODEL_LEN = 2048
POOL = "8MiB"
POOL_TOKENS = 42 * 128
"""Two and a half requests of the greatest length."""

NUM_LONG, NUM_SHORT = 16, 40
LONG, LONGEST = 300, 1800
"""Tokens of a prompt."""

ATTEMPTS = 5
"""To have so many requests come at once that the pool is full: a busy machine sends them one by one."""

SHORT_REQUESTS = 1000
LEAVING = 40
SLOW_READERS = 4
SLOW_TOKENS = 700


@pytest.fixture(scope="module")
def server(model_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    flags = ("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--gpu-memory-utilization", "0.1")
    flags += ("--enforce-eager", "--served-model-name", MODEL)
    flags += ("--executor", "lamina", "--lamina-memory", POOL, "--lamina-stagger", "always")
    directory = tmp_path_factory.mktemp("server")
    with VllmServer(model_zoo("llama"), *flags, directory=directory) as server:
        yield server


@dataclass(frozen=True)
class Questions:
    """By what is long about them."""

    short: list[Question]
    long_prompt: list[Question]
    long_answer: list[Question]


@pytest.fixture(scope="module")
def questions(engines: Engines, model_zoo: ModelZoo) -> Questions:
    # Soon after its beginning each needs one block more than the pool has for all that were let in.
    prompts = [prompt(128 * (3 + i % 2) - 20, seed=i) for i in range(NUM_LONG - 2)]
    prompts += [prompt(LONGEST, seed=i) for i in range(2)]
    prompts += [prompt(1 + i % 8, seed=i) for i in range(NUM_SHORT + SLOW_READERS + 3)]
    limits = [120] * NUM_LONG + [1 + i % 6 for i in range(NUM_SHORT)] + [SLOW_TOKENS] * (SLOW_READERS + 3)
    found = ask_stock(engines, model_zoo("llama"), prompts, limits, max_model_len=MAX_MODEL_LEN)
    long_prompt = [question for question in found if len(question.prompt) > LONG]
    by_answer = sorted(found, key=lambda question: len(question.answer))
    short = [question for question in by_answer if question not in long_prompt and len(question.answer) <= 6]
    # Prompts that begin with a near-tie are missing.
    assert len(long_prompt) > NUM_LONG - 3
    assert len(short) > NUM_SHORT - 6
    return Questions(short, long_prompt, by_answer[-SLOW_READERS:])


def ask_all(server: VllmServer, questions: Sequence[Question]) -> list[Reply]:
    """All at the same time; every other answer is streamed."""

    async def replies() -> list[Reply]:
        async with new_client(server.url, timeout=120.0) as client:
            asked = (
                ask(client, question.prompt, len(question.answer), stream=index % 2 == 0)
                for index, question in enumerate(questions)
            )
            return await asyncio.gather(*asked)

    return asyncio.run(replies())


def assert_answered(questions: Sequence[Question], replies: Sequence[Reply]) -> None:
    for index, (question, reply) in enumerate(zip(questions, replies, strict=True)):
        assert reply.error is None, f"request {index}: {reply.error}"
        assert reply.token_ids == question.answer, f"request {index}"


def assert_idle(server: VllmServer) -> None:
    """No request is left, and no KV block in use."""
    end = time.monotonic() + 60.0
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while any(values := {name: server.metric(name) for name in names}.values()):
        assert time.monotonic() < end, values
        time.sleep(0.1)


def test_more_than_the_pool_holds(server: VllmServer, questions: Questions) -> None:
    """Long requests have to wait, and to give their blocks away to others in between."""
    # The longest would wait at the head of the queue for more blocks than those before it still need.
    crowd = [question for question in questions.long_prompt if len(question.prompt) < LONGEST]
    for _ in range(ATTEMPTS):
        assert_answered(crowd, ask_all(server, crowd))
        if server.metric("num_preemptions_total") > 0:
            break
    assert server.metric("num_preemptions_total") > 0
    assert_answered(questions.long_prompt, ask_all(server, questions.long_prompt))
    assert_idle(server)


def test_a_thousand_at_once(server: VllmServer, questions: Questions) -> None:
    copies = SHORT_REQUESTS // len(questions.short) + 1
    many = (questions.short * copies)[:SHORT_REQUESTS]
    assert_answered(many, ask_all(server, many))
    assert_idle(server)


def test_longer_than_can_ever_be(server: VllmServer, questions: Questions) -> None:
    """The error says which limit; a request that fits ends where the limit is."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60, max_retries=0)
    options = {"model": MODEL, "extra_body": {"ignore_eos": True}}
    for num_prompt in (MAX_MODEL_LEN + 1, POOL_TOKENS + 1, 100_000):
        for stream in (False, True):
            with pytest.raises(
                openai.BadRequestError, match=f"maximum context length is {MAX_MODEL_LEN} tokens"
            ):
                client.completions.create(**options, prompt=[5] * num_prompt, max_tokens=1, stream=stream)
    longest = client.completions.create(**options, prompt=[5] * (MAX_MODEL_LEN - 8), max_tokens=100)
    assert longest.usage is not None
    assert longest.usage.completion_tokens == 8
    assert longest.choices[0].finish_reason == "length"
    server.get("health")
    assert_answered(questions.short, ask_all(server, questions.short))
    assert_idle(server)


def test_clients_that_leave(server: VllmServer, questions: Questions) -> None:
    """While they wait, are prefilled or stream, and more of them than fit; others stay and are answered."""
    stay = questions.long_prompt[:4] + questions.short
    rng = random.Random(0)

    async def leave_and_stay() -> tuple[list[Reply], list[Reply]]:
        async with new_client(server.url, timeout=120.0) as client:
            leaving = []
            for index in range(LEAVING):
                tokens = prompt(rng.randint(1, 1500), seed=1000 + index)
                asked = ask(client, tokens, MAX_MODEL_LEN - len(tokens), stream=index % 2 == 0)
                leaving.append(asyncio.create_task(asked))
            staying = [asyncio.create_task(ask(client, q.prompt, len(q.answer))) for q in stay]
            for task in leaving:
                await asyncio.sleep(rng.uniform(0.0, 0.1))
                task.cancel()
            return await asyncio.gather(*leaving), await asyncio.gather(*staying)

    left, stayed = asyncio.run(leave_and_stay())
    assert [reply.error for reply in left] == [None] * LEAVING
    # A fast server has answered some before they leave.
    assert sum(reply.hung_up for reply in left) > LEAVING // 2
    assert_answered(stay, stayed)
    assert_idle(server)


class SlowReader:
    """Asks for a stream and reads nothing of it until told to. Its window is small, so that the server notices."""

    def __init__(self, server: VllmServer, tokens: list[int], max_tokens: int) -> None:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(60.0)
        link.connect((server.host, server.port))
        self._connection = http.client.HTTPConnection(server.host, server.port)
        self._connection.sock = link
        body = {"model": MODEL, "prompt": tokens, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body |= {"return_token_ids": True, "ignore_eos": True}
        self._connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )

    def read(self) -> list[int]:
        """The tokens of the whole stream."""
        found: list[int] = []
        with self._connection.getresponse() as answer:
            assert answer.status == 200
            for line in answer:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    found += json.loads(data)["choices"][0]["token_ids"] or []
        self._connection.close()
        return found


def test_slow_readers(server: VllmServer, questions: Questions) -> None:
    """Nobody waits for those who do not read their streams, and they find all of it when they do."""
    slow = questions.long_answer
    assert all(len(question.answer) > SLOW_TOKENS / 2 for question in slow)
    readers = [SlowReader(server, question.prompt, len(question.answer)) for question in slow]
    others = questions.long_prompt[:2] + questions.short
    assert_answered(others, ask_all(server, others))
    assert_idle(server)
    assert [reader.read() for reader in readers] == [question.answer for question in slow]
