"""An attention worker started by hand serves one engine after the other, and says what it does."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from in_turn import IN_PROCESS, InTurn, Tokens
from programs import console, running, tail, wait_for


def stats(address: str) -> dict[str, Any]:
    """The worker's counters; empty where it does not answer."""
    command = console("vllm-lamina", "worker", "stats", address, "--json")
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return json.loads(shown.stdout) if shown.returncode == 0 else {}


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.slow
def test_two_engines_one_after_the_other(in_turn: InTurn, stock: Tokens, log: Path) -> None:
    address = free_address()
    engine = {"executor": "lamina", "lamina_workers": address}
    command = console("vllm-lamina", "worker", "--listen", address, "--memory", "256MiB")
    with running(command, log) as worker:
        assert wait_for(lambda: stats(address), 60.0), tail(log)
        _, first, second, _ = in_turn(engine, engine, **IN_PROCESS)
        assert first["tokens"] == second["tokens"] == stock
        for found in (first, second):
            assert found["attention_workers_meanwhile"] == 0
            [[counters]] = found["stats"]
            assert counters["steps"] > 0
        assert not stats(address)["connected"]
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60.0) == 0, tail(log)
    assert log.read_text().count("engine left") == 2


@pytest.mark.slow
def test_engines_on_two_workers(in_turn: InTurn, stock: Tokens, tmp_path: Path) -> None:
    """One engine lets the workers hold half of the heads each, the next one half of the blocks."""
    with ExitStack() as stack:
        addresses = [free_address(), free_address()]
        logs = [tmp_path / "first", tmp_path / "second"]
        for address, log in zip(addresses, logs, strict=True):
            command = console("vllm-lamina", "worker", "--listen", address, "--memory", "128MiB")
            stack.enter_context(running(command, log))
            assert wait_for(lambda address=address: stats(address), 60.0), tail(log)
        engine = {"executor": "lamina", "lamina_workers": ",".join(addresses)}
        _, head, sequence, _ = in_turn(engine, engine | {"lamina_partition": "sequence"}, **IN_PROCESS)
        assert head["tokens"] == sequence["tokens"] == stock
        for log in logs:
            connected = [line for line in log.read_text().splitlines() if "engine connected" in line]
            assert len(connected) == 2, tail(log)
