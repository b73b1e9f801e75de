"""Deployments on a real cluster, without vLLM: where workers run, what outlives what, what is left, what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray_clusters import GIBIBYTES, NODES, RayCluster, kill_actor_of, wait_for

from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.sources.on_ray import RaySource

ANOTHER_ENGINE = """
import sys
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.kv_cache.geometry import Geometry

connection = AttentionWorkerConnection.connect(sys.argv[1], secret_file=sys.argv[2])
connection.configure(Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125)), 8, ring_bytes=1 << 20)
print("ready", flush=True)
sys.stdin.read()
"""


def secret_file(cluster: RayCluster) -> Path:
    return cluster.home / "vllm-lamina" / "ray-lamina.secret"


def is_clean(cluster: RayCluster) -> bool:
    """All resources are back: the next deployment of all there is needs them."""
    if cluster.deployments() or cluster.attention_workers():
        return False
    free = cluster.free()
    return free.get("CPU") == NODES and free.get("lamina_memory") == NODES * GIBIBYTES


@contextmanager
def another_engine(cluster: RayCluster, address: str) -> Iterator[subprocess.Popen[str]]:
    """An engine that uses the attention worker at the address; killed in the end."""
    program = [*cluster.host.prefix, sys.executable, "-c", ANOTHER_ENGINE]
    with subprocess.Popen(
        [*program, address, str(secret_file(cluster))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as engine:
        try:
            assert engine.stdout is not None
            assert engine.stdout.readline() == "ready\n"
            wait_for(lambda: cluster.deployments()["lamina"][0]["engine"])
            yield engine
        finally:
            engine.kill()


def test_workers_are_on_different_nodes_and_end_with_the_engine(ray_cluster: RayCluster) -> None:
    """A deployment of all memory, of which nothing is left."""
    everything = f"{GIBIBYTES}GiB"
    with ray_cluster.deployed(memory=everything) as engine:
        addresses = engine.answer()
        assert addresses == [f"127.0.0.1:{7100 + i}" for i in range(NODES)]
        [(name, workers)] = ray_cluster.deployments().items()
        assert name == "lamina"
        assert [worker["address"] for worker in workers] == addresses
        assert len({worker["node"] for worker in workers}) == NODES
        status = ray_cluster.cli("status").stdout
        assert status.startswith(
            "lamina: 3 attention workers of 2 GiB (lamina_memory) and 1 CPU from port 7100"
        )
        assert status.count(", no engine for ") == NODES
        assert secret_file(ray_cluster).stat().st_mode & 0o777 == 0o600
        commands = "\n".join(ray_cluster.host.processes().values())
        assert secret_file(ray_cluster).read_text().strip() not in commands
        engine.leave()
    wait_for(lambda: is_clean(ray_cluster))
    assert not secret_file(ray_cluster).exists()


@pytest.mark.slow
def test_what_dies_comes_back_at_its_address(ray_cluster: RayCluster) -> None:
    """A killed attention worker, by its actor; a killed actor, by the engine; a killed engine finds all as it was."""

    def workers() -> list[dict[str, Any]]:
        return ray_cluster.deployments().get("lamina", [])

    with ray_cluster.deployed(ray_idle_seconds=120.0) as engine:
        addresses = engine.answer()
        first, second, third = workers()
        os.kill(int(str(first["pid"])), signal.SIGKILL)
        wait_for(lambda: workers()[0]["pid"] not in (0, first["pid"]))
        assert workers()[0]["address"] == first["address"]
        assert workers()[0]["restarts"] == 1

        kill_actor_of(second)
        assert engine.has_lost_the_second() == second["address"]
        wait_for(lambda: len(found := workers()) == NODES and found[1]["pid"] != second["pid"])
        wait_for(lambda: workers()[1]["address"])
        assert engine.has_lost_the_second() == second["address"]
        assert [worker["address"] for worker in workers()] == addresses
        assert workers()[2]["pid"] == third["pid"]

        before = [worker["pid"] for worker in workers()]
        engine.process.kill()
    with ray_cluster.deployed(ray_idle_seconds=20.0) as engine:
        assert engine.answer() == addresses
        assert [worker["pid"] for worker in workers()] == before
        engine.process.kill()
    # Nobody removes it: it does so itself.
    wait_for(lambda: is_clean(ray_cluster))


@pytest.mark.slow
def test_one_engine_and_one_shape(ray_cluster: RayCluster) -> None:
    with ray_cluster.deployed() as engine:
        with (
            another_engine(ray_cluster, engine.answer()[0]) as busy,
            ray_cluster.deployed(memory="300MiB") as other,
            ray_cluster.deployed() as second,
        ):
            [problem] = other.answer()
            assert f"serves another engine (pid {busy.pid}" in problem
            assert "and has 3 attention workers of 256 MiB" in problem
            assert "not 3 attention workers of 300 MiB" in problem
            assert "choose another --lamina-ray-name" in problem
            refused = ray_cluster.cli("down", "lamina")
            assert refused.returncode == 1
            assert "serves an engine" in refused.stderr
            [problem] = second.answer()
            assert f"serves another engine (pid {busy.pid}" in problem
        engine.process.kill()
    with ray_cluster.deployed(ray_workers=2, ray_idle_seconds=60.0) as engine:
        assert len(engine.answer()) == 2
        engine.process.kill()
        engine.process.wait()
        assert engine.process.stderr is not None
        assert "it is replaced by 2 attention workers" in engine.process.stderr.read()
    assert ray_cluster.cli("down", "lamina").stdout == "lamina: removed\n"
    wait_for(lambda: is_clean(ray_cluster))
    assert "there is no deployment 'lamina'" in ray_cluster.cli("down", "lamina").stderr


@pytest.mark.slow
def test_errors(ray_cluster: RayCluster) -> None:
    def problem(**options: object) -> str:
        with ray_cluster.deployed(**options) as engine:
            [text] = engine.answer()
        assert "\n" not in text
        return text

    text = problem(ray_workers=NODES + 1, ray_wait_seconds=2.0)
    assert "Ray has no room for 4 x 0.25 lamina_memory with 1 CPU each within 2 s" in text
    assert (
        "its 3 nodes offer lamina_memory: 2 with 1 CPU, 2 with 1 CPU, 2 with 1 CPU; free are 6 and 3 CPU"
        in text
    )
    assert "offer elsewhere: none" in problem(ray_resource="elsewhere", ray_wait_seconds=2.0)
    assert "no Ray cluster can be reached at 127.0.0.1:9 ([Errno 111]" in problem(ray="127.0.0.1:9")
    wait_for(lambda: is_clean(ray_cluster))


def test_killed_while_it_waits_for_room(ray_cluster: RayCluster) -> None:
    """Nothing of an engine that was killed goes on waiting."""
    with ray_cluster.deployed(ray_workers=NODES + 1, ray_wait_seconds=3600.0) as engine:
        assert engine.process.stderr is not None
        assert any("waiting up to 3600 s" in line for line in engine.process.stderr)
        engine.process.kill()
        wait_for(lambda: not any("ray up" in command for command in ray_cluster.host.processes().values()))


@pytest.mark.slow
def test_up_by_hand(ray_cluster: RayCluster) -> None:
    """`ray up` finds what is there, also while an engine uses it, and replaces what died; it stays until `down`."""

    def up(*arguments: str) -> tuple[list[str], list[dict[str, Any]]]:
        given = ("up", "lamina", "--workers", "2", "--memory", "256MiB", "--idle-seconds", "8", *arguments)
        done = ray_cluster.cli(*given)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(), ray_cluster.deployments()["lamina"]

    flags, made = up()
    addresses = ["127.0.0.1:7100", "127.0.0.1:7101"]
    assert flags == [
        "--lamina-workers",
        ",".join(addresses),
        "--lamina-secret-file",
        str(secret_file(ray_cluster)),
    ]
    again, found = up("--unused")
    assert again == flags
    assert [worker["pid"] for worker in found] == [worker["pid"] for worker in made]

    with another_engine(ray_cluster, addresses[0]) as engine:
        kill_actor_of(made[1])
        _, replaced = up()
        assert [worker["address"] for worker in replaced] == addresses
        assert replaced[0]["pid"] == made[0]["pid"]
        assert replaced[1]["pid"] != made[1]["pid"]
        # The second is used by nobody, and does not remove what the first needs.
        wait_for(lambda: ray_cluster.deployments()["lamina"][1]["idle_for"] > 6)
        time.sleep(6)
        assert [worker["pid"] for worker in ray_cluster.deployments()["lamina"]] == [
            w["pid"] for w in replaced
        ]
        refused = ray_cluster.cli(
            "up", "lamina", "--workers", "2", "--memory", "256MiB", "--unused", "--json"
        )
        assert refused.returncode == 1
        assert f"serves another engine (pid {engine.pid}" in json.loads(refused.stdout)["error"]
    assert ray_cluster.cli("down", "lamina", "--force").stdout == "lamina: removed\n"
    wait_for(lambda: is_clean(ray_cluster))
    assert not secret_file(ray_cluster).exists()


def test_versions_must_agree(ray_cluster: RayCluster) -> None:
    other_ray = (
        "import ray, sys; ray.__version__ = '2.1.0'; from vllm_lamina.cli import main; sys.exit(main())"
    )
    status = ray_cluster.run(
        sys.executable, "-c", other_ray, "ray", "status", "--address", ray_cluster.address
    )
    assert status.returncode == 1
    assert f"the Ray cluster at {ray_cluster.address} is of another version" in status.stderr
    assert "2.1.0" in status.stderr


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install 'vllm-lamina\\[ray\\]'"):
        RaySource(LaminaConfig(ray="auto", memory="1GiB"), 1)
