"""Configuring or running several engines in one process of their own, and what stock vLLM generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import Engines
from in_turn import MAX_TOKENS, PROMPTS, InTurn, Tokens
from jobs import Job, Phase, Request
from models import ModelZoo
from programs import program, run, tail
from workloads import greedy

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcomes]:
    """`configure({name: case}, NAME="value")` is what became of each case; see `configure.py`."""

    def outcomes(cases: dict[str, Any], by: str = "configure.py", **env: str) -> Outcomes:
        directory = tmp_path_factory.mktemp("configure")
        given, results, log = (directory / name for name in ("cases.json", "results.json", "log"))
        given.write_text(json.dumps(list(cases.values())))
        finished = run(program(by, str(given), str(results)), log, **env)
        assert finished.status == 0, tail(log)
        return dict(zip(cases, json.loads(results.read_text()), strict=True))

    return outcomes


@pytest.fixture(scope="session")
def in_turn(model_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> InTurn:
    """`in_turn(engine, engine, NAME="value")`: see `engines_in_turn.py`; the state of the process comes first."""

    def results(*engines: dict[str, Any], **env: str) -> list[dict[str, Any]]:
        directory = tmp_path_factory.mktemp("in_turn")
        found, log = directory / "found.json", directory / "log"
        command = program("engines_in_turn.py", model_zoo("llama"), str(found), json.dumps(engines))
        finished = run(command, log, deadline=300.0, **env)
        assert finished.status == 0, tail(log)
        return [*json.loads(found.read_text()), {"log": finished.output}]

    return results


@pytest.fixture(scope="session")
def stock(engines: Engines, model_zoo: ModelZoo) -> Tokens:
    """What stock vLLM generates."""
    phase = Phase("in turn", [Request(tokens, greedy(MAX_TOKENS)) for tokens in PROMPTS])
    result = engines.run(Job(model_zoo("llama"), [phase], {"max_model_len": 512}))
    return [request.completions[0].token_ids for request in result.phases[0].requests]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where a test's program writes."""
    return tmp_path / "log"
