"""An engine with worker processes, selected by vLLM's own options, generates what stock vLLM generates.

Without worker processes: test_one_process.py; with two batches, and compiled: test_server.py and real_model.
"""

from __future__ import annotations

from in_turn import IN_PROCESS, InTurn, Tokens

from vllm_lamina.compat.arguments import EXECUTOR

# vLLM's own two options, and nothing of ours.
UNPATCHED = {
    "distributed_executor_backend": EXECUTOR,
    "additional_config": {"lamina": {"memory": "64MiB", "batches": 1}},
}


def test_with_worker_processes(in_turn: InTurn, stock: Tokens) -> None:
    _, lamina, rest = in_turn(UNPATCHED, **IN_PROCESS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert lamina["tokens"] == stock
    assert lamina["attention_workers_meanwhile"] == 1
    assert lamina["attention_workers"] == 0
    assert "0 B on the model worker" in rest["log"]
