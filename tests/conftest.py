"""Fixtures for tests with whole engines: small random models, and engines that run jobs with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines import Engines
from models import ModelZoo


@pytest.fixture(scope="session")
def model_zoo(tmp_path_factory: pytest.TempPathFactory) -> ModelZoo:
    """`model_zoo("llama")` is the directory of that random model; names are in `models.py`."""
    return ModelZoo(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with Engines(tmp_path_factory.mktemp("engines")) as running:
        yield running
