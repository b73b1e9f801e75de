"""Engines that follow each other in one process: Lamina gives back what it took, and a stock engine has none of it."""

from __future__ import annotations

from in_turn import IN_PROCESS, LAMINA, InTurn, Tokens


def test_a_failed_start_lamina_stock_and_lamina(in_turn: InTurn, stock: Tokens) -> None:
    too_many_blocks = LAMINA | {"num_gpu_blocks_override": 100_000}
    # Two threads, so that a number that is not restored can be told from one that is.
    before, failed, lamina, between, again, _ = in_turn(
        too_many_blocks,
        LAMINA,
        {},
        LAMINA | {"lamina_batches": 1, "async_scheduling": True},
        **IN_PROCESS,
        OMP_NUM_THREADS="2",
    )
    assert "100000 KV blocks are asked for" in failed.pop("error")
    assert failed == before
    assert lamina["tokens"] == between["tokens"] == again["tokens"] == stock
    counts = [engine["attention_workers_meanwhile"] for engine in (lamina, between, again)]
    assert counts == [1, 0, 1]
    assert before["backend"].startswith("vllm.")
    for name in before:
        assert lamina[name] == before[name], name
        # The stock engine may leave something of its own.
        assert again[name] == between[name], name
