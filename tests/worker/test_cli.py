"""The commands `vllm-lamina worker`, `worker stats` and `collect-env`."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from engine import Engine, Request

from vllm_lamina.host import available_memory, cgroup_memory, memory_total
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection

GEOMETRY = Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125))
CLI = [sys.executable, "-m", "vllm_lamina.cli"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=60.0)


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    address = f"127.0.0.1:{free_port()}"
    command = [*CLI, "worker", "--listen", address, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        AttentionWorkerConnection.connect(address, timeout=20.0).close()
        yield address, process
    finally:
        process.kill()
        process.communicate()


def test_worker_and_stats() -> None:
    with serving("--memory", "64MiB", "--cpus", "0") as (address, process):
        assert "engine     none" in run("worker", "stats", address).stdout
        with AttentionWorkerConnection.connect(address) as connection:
            assert connection.welcome.cpus == [0]
            assert connection.pool_bytes == 64 << 20
            connection.configure(GEOMETRY, 8)
            Engine.on(connection, GEOMETRY, 8).step(0, [Request(0, 40, [1, 2])])
            table = run("worker", "stats", address).stdout
            assert "steps      1\n" in table
            assert "appended   80 tokens" in table
            stats = json.loads(run("worker", "stats", f"tcp://{address}", "--json").stdout)
            assert (stats["steps"], stats["num_blocks"], stats["connected"]) == (1, 8, True)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60.0)
        assert process.returncode == 0
        assert "64 MiB for KV blocks, 1 threads (CPUs 0)" in log


def test_idle_worker_uses_no_cpu() -> None:
    with serving() as (_, process):

        def cpu_ticks() -> int:
            with open(f"/proc/{process.pid}/stat") as stat:
                return sum(int(field) for field in stat.read().rsplit(")", 1)[1].split()[11:13])

        def cpu_ticks_of_a_second() -> int:
            before = cpu_ticks()
            time.sleep(1.0)
            return cpu_ticks() - before

        # In the first of them it may still be about to become idle.
        assert any(cpu_ticks_of_a_second() <= 1 for _ in range(5))


def test_port_in_use() -> None:
    with serving() as (address, _):
        second = run("worker", "--listen", address)
        assert second.returncode == 1
        assert f"cannot listen on {address}: Address already in use" in second.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--lease-seconds", "0.1"], "--lease-seconds 0.1 is less than 1"),
        (["--drain-seconds", "-1"], "--drain-seconds -1 is less than 0"),
        (["--memory", "much"], "'much' is not a size"),
        (["--memory", "900TiB"], "--memory 900TiB is more than the"),
        (["--cpus", "0,0"], "names a CPU twice"),
        (["--cpus", "0,4095"], "--cpus: this process may not run on CPUs 4095"),
        (["--cpus", "4095"], "--cpus: this process may not run on CPUs 4095"),
    ],
)
def test_bad_options(arguments: list[str], reason: str) -> None:
    result = run("worker", *arguments)
    assert result.returncode == 2
    assert reason in result.stderr


def test_stats_of_nobody() -> None:
    result = run("worker", "stats", f"127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert "no attention worker answered" in result.stderr


def test_collect_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    text = run("collect-env").stdout
    assert "VLLM_PLUGINS        'another', without lamina: vLLM does not know --executor lamina" in text
    assert "kernel variants     portable" in text
    assert "huge pages" in text


def test_memory_limits(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Limits of all enclosing cgroups count, in both versions of cgroups."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("10\n")
    (inner.parent / "memory.stat").write_text("anon 3\ninactive_file 4\nactive_file 2\nslab 1\n")
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2000\n")
    (old / "memory.usage_in_bytes").write_text("20\n")
    (old / "memory.stat").write_text("inactive_file 9\ntotal_inactive_file 30\n")
    own = tmp_path / "own"
    own.write_text("4:cpu,memory:/job\n0::/outer/inner\n")
    assert cgroup_memory(tmp_path, own) == [(2000, 0), (1000, 4)]
    assert 0 < available_memory() <= memory_total()
