"""A server and its attention worker, and their metrics."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cores import ATTENTION_CPU
from exposition import Scrape
from server import VllmServer
from worker_processes import Worker, free_port, wait_until, worker_process

from vllm_lamina.transport.secret import write_secret

MODEL = "tiny"
ENGINE = (
    "--dtype",
    "float32",
    "--max-model-len",
    "512",
    "--gpu-memory-utilization",
    "0.1",
    "--enforce-eager",
)
PROMPT_LEN, MAX_TOKENS = 100, 40
"""A prompt is shorter than a KV block, so that no request hits the prefix of another."""


@dataclass
class Serving:
    server: VllmServer
    worker: Worker

    def scrape(self) -> Scrape:
        return Scrape.of(self.server.url)

    def scrape_when(self, condition: Callable[[Scrape], bool]) -> Scrape:
        """The first scrape that fulfils the condition: the workers are polled about once a second."""
        found: list[Scrape] = []

        def look() -> bool:
            found[:] = [self.scrape()]
            return condition(found[0])

        wait_until(look)
        return found[0]

    def complete(self, prompt_len: int = PROMPT_LEN, max_tokens: int = MAX_TOKENS) -> None:
        body = {"model": MODEL, "prompt": [5] * prompt_len, "max_tokens": max_tokens, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.server.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            answer.read()


@contextmanager
def serving_with_a_worker(model: str, directory: Path, *arguments: str) -> Iterator[Serving]:
    """A server with an attention worker of its own, which wants a secret."""
    secret = directory / "secret"
    write_secret(secret)
    options = ("--cpus", ATTENTION_CPU, "--secret-file", str(secret))
    with worker_process(directory / "worker.log", f"127.0.0.1:{free_port()}", *options) as worker:
        lamina = (
            "--executor",
            "lamina",
            "--lamina-workers",
            worker.address,
            "--lamina-secret-file",
            str(secret),
        )
        model_arguments = (model, *ENGINE, "--served-model-name", MODEL)
        with VllmServer(*model_arguments, *lamina, *arguments, directory=directory) as server:
            yield Serving(server, worker)
