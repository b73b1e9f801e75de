"""Engines whose attention workers Ray runs: stock vLLM's tokens, also from an engine that was killed and restarted."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from comparison import assert_same
from engines import Engines
from jobs import Job, Phase, Request
from models import ModelZoo
from openai import OpenAI
from ray_clusters import NODES, RayCluster, cluster_across_hosts, kill_actor_of, wait_for
from server import VllmServer
from workloads import greedy, prompt, requests

ENGINE = (
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--gpu-memory-utilization",
    "0.1",
    "--enforce-eager",
)

PREFIX = prompt(300, seed=7)
PHASES = [
    Phase("edges", requests((1, 33, 129, 300), max_tokens=12)),
    Phase("shared prefix", [Request(PREFIX + prompt(i, seed=i), greedy(8)) for i in range(1, 4)]),
]


def test_same_tokens(engines: Engines, model_zoo: ModelZoo, ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Three workers, both lanes: divided by sequence by an engine that deploys them, by request where they were."""
    environment = {"XDG_CACHE_HOME": str(ray_cluster.home)}
    job = Job(model_zoo("four_kv_heads"), PHASES, {"block_size": 32}, environment=environment)
    stock = engines.run(job)
    options = {
        "lamina_ray": ray_cluster.address,
        "lamina_ray_workers": NODES,
        "lamina_memory": "128MiB",
        "lamina_partition": "sequence",
    }
    with Engines(tmp_path, beside=engines, host=ray_cluster.host.namespace) as far_engines:
        lamina = far_engines.run(replace(job, executor="lamina", engine=job.engine | options))
        assert_same(stock, lamina)
        wait_for(lambda: not ray_cluster.deployments() and not ray_cluster.attention_workers())

        made = ray_cluster.cli("up", "mine", "--workers", str(NODES), "--memory", "128MiB", "--json")
        by_hand = json.loads(made.stdout)
        options = {
            "lamina_workers": ",".join(by_hand["addresses"]),
            "lamina_secret_file": by_hand["secret_file"],
            "lamina_partition": "request",
        }
        lamina = far_engines.run(replace(job, executor="lamina", engine=job.engine | options))
        assert_same(stock, lamina)
    assert [worker["engine"] for worker in ray_cluster.deployments()["mine"]] == [""] * NODES
    assert ray_cluster.cli("down", "mine").returncode == 0
    wait_for(lambda: not ray_cluster.deployments() and not ray_cluster.attention_workers())


def test_actor_that_dies(
    engines: Engines, model_zoo: ModelZoo, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """While the engine generates; it has the actor replaced, and goes on."""
    phase = Phase("long", requests((1, 33, 300), max_tokens=800))
    environment = {"XDG_CACHE_HOME": str(ray_cluster.home)}
    job = Job(model_zoo("four_kv_heads"), [phase], environment=environment)
    options = {"lamina_ray": ray_cluster.address, "lamina_ray_workers": 2, "lamina_memory": "128MiB"}
    secret = ray_cluster.home / "vllm-lamina" / "ray-lamina.secret"

    def steps(address: object) -> int:
        command = [sys.executable, "-m", "vllm_lamina.cli", "worker", "stats", str(address), "--json"]
        found = ray_cluster.run(*command, "--secret-file", str(secret))
        return json.loads(found.stdout)["steps"] if found.returncode == 0 else 0

    def lose() -> None:
        wait_for(lambda: any(worker["engine"] for worker in ray_cluster.deployments().get("lamina", [])))
        second = ray_cluster.deployments()["lamina"][1]
        wait_for(lambda: steps(second["address"]) > 10)
        kill_actor_of(second)

    with (
        Engines(tmp_path, beside=engines, host=ray_cluster.host.namespace) as far_engines,
        ThreadPoolExecutor(1) as pool,
    ):
        losing = pool.submit(lose)
        lamina = far_engines.run(replace(job, executor="lamina", engine=options))
        losing.result()
    assert_same(engines.run(job), lamina)
    log = "".join(path.read_text() for path in tmp_path.glob("job-*.log"))
    assert "attention workers complete again" in log
    wait_for(lambda: not ray_cluster.deployments() and not ray_cluster.attention_workers())


@pytest.mark.killed_server_on_ray
def test_server_that_is_killed(
    engines: Engines, model_zoo: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two hosts, over UCX. The second server finds the attention workers of the first; told to end, it ends them."""
    model, prompts = model_zoo("four_kv_heads"), [prompt(length, seed=3) for length in (5, 40, 300)]
    phase = Phase("questions", [Request(tokens, greedy(16)) for tokens in prompts])
    stock = engines.run(Job(model, [phase])).phases[0]
    expected = [result.completions[0].token_ids for result in stock.requests]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with cluster_across_hosts(2, tmp_path) as cluster:

        def server(name: str) -> VllmServer:
            (tmp_path / name).mkdir()
            flags = ("--executor", "lamina", "--lamina-ray", cluster.address, "--lamina-ray-workers", "2")
            flags += ("--lamina-memory", "128MiB", "--served-model-name", "m", *ENGINE)
            where, prefix = cluster.host.address, cluster.host.prefix
            return VllmServer(model, *flags, directory=tmp_path / name, host=where, prefix=prefix)

        def ask(server: VllmServer) -> list[list[int]]:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60, max_retries=0)
            body = {"return_token_ids": True, "ignore_eos": True}
            answers = [
                client.completions.create(
                    model="m", prompt=tokens, temperature=0.0, max_tokens=16, extra_body=body
                )
                for tokens in prompts
            ]
            return [answer.choices[0].token_ids for answer in answers]  # type: ignore[attr-defined]

        def identities() -> list[tuple[object, ...]]:
            workers = cluster.deployments()["lamina"]
            return [(worker["address"], worker["node"], worker["pid"]) for worker in workers]

        first = server("first").__enter__()
        try:
            assert ask(first) == expected
            before = identities()
            found = {str(address).partition(":")[0] for address, _, _ in before}
            assert found == {host.address for host in cluster.hosts}
        finally:
            first.kill()
        with server("second") as second:
            assert identities() == before
            assert ask(second) == expected
        wait_for(lambda: not cluster.deployments() and not cluster.attention_workers())
