"""An attention worker started by hand serves one engine after the other, and says what it does."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from in_turn import IN_PROCESS, InTurn
from programs import console, running, tail, wait_for


def stats(address: str) -> dict[str, Any]:
    """The worker's counters; empty where it does not answer."""
    command = console("vllm-lamina", "worker", "stats", address, "--json")
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return json.loads(shown.stdout) if shown.returncode == 0 else {}


def test_two_engines_one_after_the_other(in_turn: InTurn, stock: dict[str, Any], log: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    engine = {"executor": "lamina", "lamina_workers": address}
    command = console("vllm-lamina", "worker", "--listen", address, "--memory", "256MiB")
    with running(command, log) as worker, ThreadPoolExecutor() as pool:
        assert wait_for(lambda: stats(address), 30.0), tail(log)
        engines = pool.submit(in_turn, engine, engine, **IN_PROCESS)
        attended = wait_for(lambda: engines.done() or stats(address).get("steps", 0) > 0, 180.0)
        assert attended
        assert not engines.done(), "no step was seen while the engines ran"
        _, first, second, _ = engines.result(timeout=180.0)
        assert first["tokens"] == second["tokens"] == stock["tokens"]
        assert first["attention_workers_meanwhile"] == 0
        assert not stats(address)["connected"]
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10.0) == 0, tail(log)
    assert log.read_text().count("engine left") == 2
