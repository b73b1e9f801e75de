"""Lamina is selected by flags, by vLLM's configuration file and by vLLM's own options, and the help explains it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from models import ModelZoo

from vllm_lamina.compat.arguments import EXECUTOR
from vllm_lamina.config import LaminaConfig

YAML = """\
model: {model}
max-model-len: 512
executor: lamina
lamina-memory: 64MiB
lamina-batches: 1
"""


OPTIONS = {"memory": "64MiB", "batches": 1}
HELP = "help"


@pytest.fixture(scope="module")
def outcomes(
    configure: Callable[[dict[str, Any]], Any], model_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What became of each route, and of a user who asks for help."""
    model, file = model_zoo("llama"), tmp_path_factory.mktemp("routes") / "engine.yaml"
    file.write_text(YAML.format(model=model))
    flags = ["--executor", "lamina", "--lamina-memory", "64MiB", "--lamina-batches", "1"]
    backend = ["--distributed-executor-backend", EXECUTOR]
    additional = ["--additional-config", json.dumps({"lamina": OPTIONS})]
    found: dict[str, Any] = configure(
        {
            "flags": {"command": ["serve", model, *flags]},
            "file": {"command": ["serve", "--config", str(file)]},
            "unpatched": {"command": ["serve", model, *backend, *additional]},
            "keywords": {
                "arguments": {
                    "model": model,
                    "executor": "lamina",
                    "lamina_memory": "64MiB",
                    "lamina_batches": 1,
                }
            },
            HELP: {"command": ["serve", "--help=lamina"]},
        }
    )
    return found


def test_routes(outcomes: dict[str, Any]) -> None:
    routes = outcomes.keys() - {HELP}
    assert len(routes) == 4
    for name in routes:
        assert outcomes[name]["backend"] == EXECUTOR, name
        assert outcomes[name]["additional_config"] == {"lamina": OPTIONS}, name


def test_help_explains_every_option(outcomes: dict[str, Any]) -> None:
    text = re.sub(r"\s+", " ", outcomes[HELP]["message"])
    assert "--executor {lamina}" in text
    for field in dataclasses.fields(LaminaConfig):
        assert "--lamina-" + field.name.replace("_", "-") in text
        assert field.metadata["help"].replace("%%", "%") in text
