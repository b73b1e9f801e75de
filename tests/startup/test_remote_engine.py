"""An engine whose attention worker is on another host: same tokens as stock, with a secret, over UCX."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_turn import IN_PROCESS, InTurn, Tokens
from network import PORT, hosts
from worker_processes import wait_until, worker_process

from vllm_lamina.transport.secret import write_secret


@pytest.mark.slow
def test_engine_with_a_remote_worker(in_turn: InTurn, stock: Tokens, log: Path) -> None:
    secret = log.with_name("secret")
    write_secret(secret)
    arguments = ("--memory", "256MiB", "--secret-file", str(secret))
    with (
        hosts(1) as [there],
        worker_process(log, f"0.0.0.0:{PORT}", *arguments, prefix=there.prefix) as worker,
    ):
        address = f"{there.address}:{PORT}"
        engine = {"executor": "lamina", "lamina_workers": address, "lamina_secret_file": str(secret)}
        _, remote, _ = in_turn(engine, **IN_PROCESS)
        assert "tokens" in remote, remote
        assert remote["tokens"] == stock
        assert "channel over tcp/" in worker.log
        wait_until(lambda: "engine left" in worker.log)
