"""Ray clusters on hosts that network namespaces stand for, and what is on them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from network import Host, hosts, lonely_host

NODES = 3
GIBIBYTES = 2
CLUSTER = Path(__file__).with_name("cluster.py")
STATUS = Path(__file__).with_name("status.py")
DEPLOY = Path(__file__).with_name("deploy.py")
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}
DEADLINE = 90.0


@dataclass(frozen=True)
class RayCluster:
    """Each of the nodes offers 2 GiB of `lamina_memory` and 1 CPU; programs run on the first host."""

    hosts: tuple[Host, ...]
    address: str
    home: Path
    """Engines stand here, beside a package that is called like one they need and cannot be imported."""
    status: subprocess.Popen[str]
    """Runs `status.py`: a new process for each look would take most of the tests' time."""

    @property
    def host(self) -> Host:
        return self.hosts[0]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program there."""
        return subprocess.run(
            [*self.host.prefix, *command],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            env=os.environ | ENVIRONMENT | {"XDG_CACHE_HOME": str(self.home)},
        )

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`vllm-lamina ray ARGUMENTS` there."""
        command = [sys.executable, "-m", "vllm_lamina.cli", "ray", *arguments]
        return self.run(*command, "--address", self.address)

    def deployments(self) -> dict[str, list[dict[str, Any]]]:
        """What `vllm-lamina ray status --json` says."""
        found: dict[str, list[dict[str, Any]]] = self._status()[0]
        return found

    def free(self) -> dict[str, float]:
        """What Ray can still give away, by resource."""
        found: dict[str, float] = self._status()[1]
        return found

    def _status(self) -> list[Any]:
        assert self.status.stdin is not None
        assert self.status.stdout is not None
        self.status.stdin.write("\n")
        self.status.stdin.flush()
        assert select.select([self.status.stdout], [], [], DEADLINE)[0], "deadline passed"
        found: list[Any] = json.loads(self.status.stdout.readline())
        return found

    def attention_workers(self) -> list[int]:
        """Their processes, and those of their actors."""
        processes = [process for host in self.hosts for process in host.processes().items()]
        return [
            pid for pid, text in processes if "attention_worker" in text or "AttentionWorkerActor" in text
        ]

    @contextmanager
    def deployed(self, **options: Any) -> Iterator[Deployed]:
        """A deployment as an engine makes it; in the end the engine is killed, where it did not leave before."""
        given = {
            "ray": self.address,
            "ray_workers": NODES,
            "memory": "256MiB",
            "ray_idle_seconds": 60.0,
        } | options
        command = [*self.host.prefix, sys.executable, str(DEPLOY), json.dumps(given)]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | {"XDG_CACHE_HOME": str(self.home)},
            cwd=self.home,
        ) as process:
            try:
                yield Deployed(process)
            finally:
                process.kill()


@dataclass(frozen=True)
class Deployed:
    """The process that stands for an engine."""

    process: subprocess.Popen[str]

    def has_lost_the_second(self) -> str:
        """Where it is to be tried again."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        [address] = self.answer()
        return address

    def answer(self) -> list[str]:
        """The addresses of its attention workers, or its error."""
        assert self.process.stdout is not None
        answer: list[str] = json.loads(self.process.stdout.readline())
        return answer

    def leave(self) -> None:
        """Let it end as an engine that is told to."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(DEADLINE) == 0


def kill_actor_of(worker: dict[str, Any]) -> None:
    parent = Path(f"/proc/{worker['pid']}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(parent), signal.SIGKILL)


def wait_for(condition: Callable[[], object], deadline: float = DEADLINE) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "deadline passed"
        time.sleep(0.2)


@contextmanager
def cluster_on_one_host(directory: Path) -> Iterator[RayCluster]:
    """Three nodes on a host whose only address is 127.0.0.1. Skips where there is no Ray, or no network namespace."""
    needs_ray()
    _mislead(directory)
    log = directory / "cluster.log"
    with lonely_host() as host, log.open("w") as errors:
        command = [*host.prefix, sys.executable, str(CLUSTER), str(NODES), str(GIBIBYTES)]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | ENVIRONMENT,
        ) as process:
            try:
                assert process.stdout is not None
                address = process.stdout.readline().strip()
                assert address, f"the Ray cluster did not start: {log.read_text()[-2000:]}"
                with _looking_at(host, address) as status:
                    yield RayCluster((host,), address, directory, status)
            finally:
                process.communicate()
        wait_for(lambda: not host.processes())


@contextmanager
def cluster_across_hosts(count: int, directory: Path) -> Iterator[RayCluster]:
    """One node on each of that many hosts, started as a user does."""
    needs_ray()
    _mislead(directory)
    with hosts(count) as found, ExitStack() as stack:
        address = f"{found[0].address}:6379"
        for index, host in enumerate(found):
            where = ["--head", "--port", "6379", "--include-dashboard", "false"] if index == 0 else []
            where += [] if index == 0 else ["--address", address]
            command = [*host.prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where]
            command += ["--node-ip-address", host.address, "--num-cpus", "1", "--disable-usage-stats"]
            command += ["--object-store-memory", str(80 << 20)]
            command += ["--resources", json.dumps({"lamina_memory": GIBIBYTES})]
            log = stack.enter_context((directory / f"node{index}.log").open("w"))
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
            stack.callback(_end, process, host)
            wait_for(
                lambda process=process, log=log: (
                    process.poll() is not None or "Ray runtime started" in Path(log.name).read_text()
                )
            )
            assert process.poll() is None, Path(log.name).read_text()
        with _looking_at(found[0], address) as status:
            yield RayCluster(tuple(found), address, directory, status)


@contextmanager
def _looking_at(host: Host, address: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*host.prefix, sys.executable, str(STATUS), address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.communicate()


def _end(node: subprocess.Popen[bytes], host: Host) -> None:
    node.terminate()
    node.wait(DEADLINE)
    wait_for(lambda: not host.processes())


def _mislead(directory: Path) -> None:
    (directory / "zmq.py").write_text("raise ImportError('zmq of the working directory')\n")


def needs_ray() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'vllm-lamina[ray]'")
