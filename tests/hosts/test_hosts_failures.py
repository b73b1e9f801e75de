"""What a user reads at the end of `vllm serve` when a worker on another host does not fit, or is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from generating import lose_while_generating
from models import ModelZoo
from network import Host, addresses, workers_on
from server import SERVER_ENV, VllmServer

from vllm_lamina.transport.secret import write_secret

# float32, without compiling: quick to start.
ENGINE = (
    "--dtype",
    "float32",
    "--max-model-len",
    "2048",
    "--gpu-memory-utilization",
    "0.1",
    "--enforce-eager",
)

SILENT = "something else", "nobody"
"""Cases in which nothing answers that is an attention worker."""

CONFIGURE = Path(__file__).parent.parent / "startup" / "configure.py"

OTHER_VERSION = """
import sys
import vllm_lamina.worker.attention_worker.process as worker
worker.PROTOCOL_VERSION += 1
from vllm_lamina.cli import main
sys.exit(main())
"""

ANOTHER_ENGINE = """
import sys, time
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.kv_cache.geometry import Geometry

connection = AttentionWorkerConnection.connect(sys.argv[1], secret_file=sys.argv[2])
connection.configure(Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125)), 8, ring_bytes=1 << 20)
print("ready", flush=True)
time.sleep(600)
"""


def serve(model: str, host: Host, log: Path, *flags: str, deadline: float = 180.0) -> tuple[int, str]:
    """Status and last line of a server that does not start; nothing of it may be left."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [*host.prefix, vllm, "serve", model, *ENGINE, "--executor", "lamina", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | SERVER_ENV,
            start_new_session=True,
        )
    try:
        status = process.wait(deadline)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status, log.read_text(errors="replace").rstrip().rpartition("\n")[2]


def refusals(model: str, host: Host, directory: Path, cases: dict[str, dict[str, str]]) -> dict[str, str]:
    """The error of each engine, given as options of Lamina; one process configures them all, as `vllm serve` does.

    Where nobody answers it waits for a second, not for ten.
    """
    given, found = directory / "cases.json", directory / "found.json"
    common = {"model": model, "dtype": "float32", "max_model_len": 2048, "executor": "lamina"}
    given.write_text(
        json.dumps(
            [
                {"arguments": common | options} | ({"patience": 1.0} if name in SILENT else {})
                for name, options in cases.items()
            ]
        )
    )
    command = [*host.prefix, sys.executable, str(CONFIGURE), str(given), str(found)]
    subprocess.run(command, env=os.environ | SERVER_ENV, check=True, timeout=180.0, capture_output=True)
    outcomes = json.loads(found.read_text())
    assert all("error" in outcome for outcome in outcomes), outcomes
    return {name: outcome["message"] for name, outcome in zip(cases, outcomes, strict=True)}


@contextmanager
def started(command: Sequence[str], first_words: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has printed a line with these words."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            assert any(first_words in line for line in process.stdout)
            yield process
        finally:
            process.kill()


def test_errors_at_start(model_zoo: ModelZoo, four_hosts: list[Host], secret: Path, tmp_path: Path) -> None:
    """Each names the worker and says what to do; the server's last line is that error."""
    model = model_zoo("four_kv_heads")
    serving, fine_host, busy_host, small_host = four_hosts
    write_secret(other_secret := tmp_path / "other.secret")
    something_else, nobody = f"{fine_host.address}:7101", f"{fine_host.address}:7102"
    other_version = f"{busy_host.address}:7101"
    python = (sys.executable, "-c")
    newer = (*python, OTHER_VERSION, "worker", "--listen", other_version, "--secret-file", str(secret))
    with ExitStack() as stack:
        fine, busy = stack.enter_context(workers_on([fine_host, busy_host], secret, tmp_path / "fine"))
        memory = ("--memory", "1MiB")
        [small] = stack.enter_context(workers_on([small_host], secret, tmp_path / "small", *memory))
        listener = (*fine_host.prefix, sys.executable, "-u", "-m", "http.server", "7101")
        stack.enter_context(started(listener, "Serving HTTP"))
        stack.enter_context(started((*busy_host.prefix, *newer, "--memory", "64MiB"), "listening on"))
        engine = (*serving.prefix, *python, ANOTHER_ENGINE, busy.address, str(secret))
        other_engine = stack.enter_context(started(engine, "ready"))

        def workers(*addresses: str, file: Path = secret) -> dict[str, str]:
            return {"lamina_workers": ",".join(addresses), "lamina_secret_file": str(file)}

        cases = {
            "wrong secret": workers(fine.address, file=other_secret),
            "no secret": {"lamina_workers": fine.address},
            "other version": workers(fine.address, other_version),
            "too small": workers(fine.address, small.address) | {"lamina_partition": "head"},
            "something else": workers(something_else),
            "nobody": workers(nobody),
            "busy": workers(fine.address, busy.address),
        }
        says = {
            "wrong secret": f"{fine.address} has another secret than this side: use the same secret file on both",
            "no secret": f"{fine.address} is reached over the network and needs a secret: give its secret file",
            "other version": f"{other_version} runs vllm-lamina .*: install the same version on both",
            "too small": f"{small.address}.*--memory",
            "something else": f"{something_else}: what listens there is another program",
            "nobody": f"no attention worker answered at {nobody} within 1 s; start one with",
            "busy": rf"{busy.address} serves another engine \(pid {other_engine.pid} on .*; stop that one",
        }
        messages = refusals(model, serving, tmp_path, cases)
        for name, words in says.items():
            assert re.search(words, messages[name]), f"{name}: {messages[name]}"

        log = tmp_path / "server.log"
        flags = ("--lamina-workers", fine.address, "--lamina-secret-file", str(other_secret))
        status, last_line = serve(model, serving, log, *flags)
        assert status != 0
        assert says["wrong secret"] in last_line


@pytest.mark.slow
def test_one_of_three_workers_is_killed(
    model_zoo: ModelZoo, four_hosts: list[Host], secret: Path, tmp_path: Path
) -> None:
    serving, *worker_hosts = four_hosts
    with workers_on(worker_hosts, secret, tmp_path) as workers:
        flags = ("--executor", "lamina", "--lamina-workers", addresses(workers))
        flags += ("--lamina-secret-file", str(secret), "--lamina-stagger", "always")
        flags += ("--lamina-partition", "sequence", "--served-model-name", "m")
        model = model_zoo("four_kv_heads")
        with VllmServer(
            model, *ENGINE, *flags, directory=tmp_path, host=serving.address, prefix=serving.prefix
        ) as server:
            log = lose_while_generating(server, "m", workers[1].process.kill)
    assert "the peer died or the link to it broke" in log or "is lost" in log
    assert f"going on without {workers[1].address}" in log
