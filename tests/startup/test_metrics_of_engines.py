"""Engines without a server: metrics where statistics are on, by worker; and none where they are off or Lamina is."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from in_turn import IN_PROCESS
from models import ModelZoo
from programs import program, run, tail
from worker_processes import free_port, worker_process

Metrics = list[dict[str, Any]]

TOKENS = 3 * 4 * (150 + 19)
"""In three layers: four prompts of 150 tokens and 20 more each, of which the last is never fed."""


@dataclass(frozen=True)
class Outcome:
    """Of engines that ran one after the other in one process: their metrics, and Lamina's modules imported by then."""

    addresses: list[str]
    """Of two workers that some of them used."""
    metrics: dict[str, Metrics]
    imported: dict[str, list[str]]


@pytest.fixture(scope="module")
def outcome(model_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    directory = tmp_path_factory.mktemp("engines")
    results, log = directory / "results.json", directory / "log"
    stock = {"kv_cache_memory_bytes": 64 << 20}
    with ExitStack() as stack:
        addresses = []
        for name in ("first", "second"):
            address = f"127.0.0.1:{free_port()}"
            stack.enter_context(worker_process(directory / name, address, "--cpus", "1"))
            addresses.append(address)
        workers = {"executor": "lamina", "lamina_workers": ",".join(addresses), "block_size": 32}
        by_name: dict[str, tuple[dict[str, Any], int]] = {
            "stock": (stock | {"disable_log_stats": False}, 0),
            "off": ({"executor": "lamina", "lamina_memory": "64MiB"}, 0),
            "sequence": (workers | {"lamina_partition": "sequence", "disable_log_stats": False}, TOKENS),
            "one batch": (workers | {"lamina_batches": 1, "disable_log_stats": False}, 2 * TOKENS),
        }
        engines = json.dumps(list(by_name.values()))
        command = program("metrics_of_engines.py", model_zoo("llama"), str(results), engines)
        finished = run(command, log, deadline=240.0, **IN_PROCESS)
    assert finished.status == 0, tail(log)
    metrics, imported = zip(*json.loads(results.read_text()), strict=True)
    return Outcome(
        addresses, dict(zip(by_name, metrics, strict=True)), dict(zip(by_name, imported, strict=True))
    )


def value(metrics: Metrics, name: str, **labels: str) -> float:
    [found] = [
        metric["value"]
        for metric in metrics
        if metric["name"] == f"vllm:lamina_{name}" and labels.items() <= metric["labels"].items()
    ]
    return float(found)


def test_without_lamina_nothing_is_registered(outcome: Outcome) -> None:
    assert outcome.metrics["stock"] == []
    assert outcome.imported["stock"] == []
    assert outcome.imported["off"]


def test_without_statistics_nothing_is_registered(outcome: Outcome) -> None:
    """The default of ``LLM``."""
    assert outcome.metrics["off"] == []


@pytest.mark.parametrize("name", ["sequence", "one batch"])
def test_each_worker_has_its_own(outcome: Outcome, name: str) -> None:
    metrics = outcome.metrics[name]
    assert value(metrics, "workers") == value(metrics, "workers_up") == 2
    # Some requests begin a step later than others, if two batches are in flight.
    assert value(metrics, "steps") >= 20
    assert value(metrics, "exchange_wait_seconds") >= 19 * 3
    assert value(metrics, "model_worker_busy_seconds") >= 0
    for address in outcome.addresses:
        assert value(metrics, "worker_up", worker=address) == 1
        assert value(metrics, "worker_received_bytes", worker=address) > 10_000
        assert value(metrics, "worker_sent_bytes", worker=address) > 10_000
        assert 0 < value(metrics, "worker_steps", worker=address) <= value(metrics, "steps")
        assert value(metrics, "worker_kv_cache_usage_perc", worker=address) == 0


def test_tokens_are_divided_by_sequence_and_repeated_by_head(outcome: Outcome) -> None:
    by_sequence, by_head = (
        [value(outcome.metrics[name], "worker_tokens_appended", worker=a) for a in outcome.addresses]
        for name in ("sequence", "one batch")
    )
    assert sum(by_sequence) == TOKENS
    assert min(by_sequence) > 0.3 * TOKENS
    assert by_head == [TOKENS, TOKENS]
