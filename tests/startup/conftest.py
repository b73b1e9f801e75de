"""Configuring many engines in one process, for tests of what is accepted and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from programs import program, run, tail

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Outcomes]:
    """`configure({name: case})` is what became of each case; see `configure.py`."""

    def outcomes(cases: dict[str, Any]) -> Outcomes:
        directory = tmp_path_factory.mktemp("configure")
        given, results, log = (directory / name for name in ("cases.json", "results.json", "log"))
        given.write_text(json.dumps(list(cases.values())))
        finished = run(program("configure.py", str(given), str(results)), log)
        assert finished.status == 0, tail(log)
        return dict(zip(cases, json.loads(results.read_text()), strict=True))

    return outcomes
