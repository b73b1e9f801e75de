"""Fixtures for tests with whole engines: small random models and a real one, and engines that run jobs with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from engines import Engines
from models import ModelZoo

ROOT = Path(__file__).parent.parent

TAKES_MINUTES = ("clean_install", "every_partition", "killed_server_on_ray", "long_chaos", "slow")
"""Markers of tests that run only where they are asked for."""


def pytest_report_header() -> str:
    return f"vLLM {version('vllm')}, model runner V{2 if os.environ.get('VLLM_USE_V2_MODEL_RUNNER') == '1' else 1}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in TAKES_MINUTES:
        if marker not in config.getoption("markexpr"):
            skip = pytest.mark.skip(reason=f"takes minutes; run with -m {marker}")
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(skip)


@pytest.fixture(scope="session")
def model_zoo(tmp_path_factory: pytest.TempPathFactory) -> ModelZoo:
    """`model_zoo("llama")` is the directory of that random model; names are in `models.py`."""
    return ModelZoo(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with Engines(tmp_path_factory.mktemp("engines")) as running:
        yield running


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory; the GGUF file that it was made of lies beside it.

    Takes seconds to make the first time, and is kept in the checkout.
    """
    program = [sys.executable, str(ROOT / "scripts" / "get_model.py")]
    output = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout
    return Path(output.strip())
