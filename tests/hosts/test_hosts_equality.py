"""An engine on one host, three attention workers on others, with a secret: stock vLLM's tokens in each partition."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase, Request
from models import ModelZoo
from network import Host, addresses, workers_on
from openai import OpenAI
from server import VllmServer
from transformers import AutoTokenizer
from worker_processes import wait_until
from workloads import greedy, prompt, requests

PARTITIONS = ("head", "sequence", "request")

PREFIX = prompt(400, seed=7)
PHASES = [
    Phase("edges", requests((1, 33, 129, 300), max_tokens=12)),
    Phase("long", requests((1100, 5, 64), max_tokens=8, seed=20)),
    Phase("shared prefix", [Request(PREFIX + prompt(i, seed=i), greedy(8)) for i in range(1, 5)]),
]


def test_each_partition(
    engines: Engines, model_zoo: ModelZoo, four_hosts: list[Host], secret: Path, tmp_path: Path
) -> None:
    """With both lanes; one engine after the other on the same three workers."""
    serving, *worker_hosts = four_hosts
    options = {"max_model_len": 2048, "max_num_batched_tokens": 512, "block_size": 32}
    job = Job(model_zoo("four_kv_heads"), PHASES, options)
    stock = engines.run(job)
    with (
        workers_on(worker_hosts, secret, tmp_path) as workers,
        Engines(tmp_path, beside=engines, host=serving.namespace) as far_engines,
    ):
        for partition in PARTITIONS:
            far: dict[str, Any] = {
                "lamina_workers": addresses(workers),
                "lamina_secret_file": str(secret),
                "lamina_partition": partition,
            }
            before = [host.count("rx_bytes") for host in worker_hosts]
            lamina = far_engines.run(replace(job, executor="lamina", engine=options | far))
            assert_same(stock, lamina)
            if partition == "request":
                continue  # how many requests a worker gets is a matter of timing
            for host, received in zip(worker_hosts, before, strict=True):
                assert host.count("rx_bytes") - received > 1 << 18, f"{partition}: a worker had nothing to do"
        for worker in workers:
            assert worker.log.count("channel over tcp/eth0") == len(PARTITIONS)
            wait_until(lambda worker=worker: worker.log.count("engine left") == len(PARTITIONS))


QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a short sentence about the sea.",
    "Who wrote Hamlet? " * 60,
]
MAX_TOKENS = 32
REAL_ENGINE = {"dtype": "float32", "max_model_len": 2048}


@pytest.mark.every_partition
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_server_with_the_real_model(
    engines: Engines, real_model: Path, four_hosts: list[Host], secret: Path, tmp_path: Path, partition: str
) -> None:
    """The questions come together, so that both lanes have requests; then again, while a link is cut and mended."""
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    prompts = [tokenizer.encode(question) for question in QUESTIONS]
    phase = Phase("questions", [Request(tokens, greedy(MAX_TOKENS)) for tokens in prompts])
    stock = engines.run(Job(str(real_model), [phase], REAL_ENGINE, kv_memory_mib=512)).phases[0]
    expected = [result.completions[0].token_ids for result in stock.requests]

    serving, *worker_hosts = four_hosts
    flags = ("--executor", "lamina", "--lamina-partition", partition, "--lamina-stagger", "always")
    flags += (
        "--dtype",
        "float32",
        "--max-model-len",
        "2048",
        "--gpu-memory-utilization",
        "0.2",
        "--enforce-eager",
    )
    with workers_on(worker_hosts, secret, tmp_path, "--lease-seconds", "3") as workers:
        where = ("--lamina-workers", addresses(workers), "--lamina-secret-file", str(secret))
        with VllmServer(
            str(real_model),
            *flags,
            *where,
            "--served-model-name",
            "m",
            directory=tmp_path,
            host=serving.address,
            prefix=serving.prefix,
        ) as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=120, max_retries=0)

            def ask(tokens: list[int]) -> list[int]:
                body = {"return_token_ids": True, "ignore_eos": True}
                answer = client.completions.create(
                    model="m", prompt=tokens, temperature=0.0, max_tokens=MAX_TOKENS, extra_body=body
                )
                return answer.choices[0].token_ids  # type: ignore[attr-defined]

            with ThreadPoolExecutor(len(prompts)) as pool:
                assert list(pool.map(ask, prompts)) == expected
            assert f"divided by {partition}" in server.log_file.read_text()
            lost = f"the attention worker at {workers[1].address} is lost: it has not answered for"
            with ThreadPoolExecutor(len(prompts)) as pool:
                answers = pool.map(ask, prompts)
                worker_hosts[1].cut_link()
                wait_until(lambda: lost in server.log_file.read_text())
                worker_hosts[1].heal_link()
                assert list(answers) == expected
            assert ask(prompts[0]) == expected[0]
