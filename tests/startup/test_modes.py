"""Every way to run an engine generates what stock vLLM generates, with its attention on an attention worker."""

from __future__ import annotations

from typing import Any

import pytest
from in_turn import LAMINA, InTurn

from vllm_lamina.compat.arguments import EXECUTOR

# vLLM's own two options, and nothing of ours.
UNPATCHED = {
    "distributed_executor_backend": EXECUTOR,
    "additional_config": {"lamina": {"memory": "64MiB", "batches": 2}},
}


# Without worker processes: test_one_process.py. Eager by default; see engines_in_turn.py.
@pytest.mark.parametrize(
    "engine",
    [LAMINA | {"lamina_batches": 1}, UNPATCHED, LAMINA | {"enforce_eager": False}],
    ids=["one batch", "unpatched route", "compiled"],
)
def test_with_worker_processes(in_turn: InTurn, stock: dict[str, Any], engine: dict[str, Any]) -> None:
    _, lamina, rest = in_turn(engine, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert lamina["tokens"] == stock["tokens"]
    assert lamina["attention_workers_meanwhile"] == 1
    assert lamina["attention_workers"] == 0
    assert "0 B on the model worker" in rest["log"]
