"""Lamina is selected by flags, by vLLM's configuration file and by vLLM's own options, and the help explains it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import ModelZoo
from programs import console, run

from vllm_lamina.compat.arguments import EXECUTOR
from vllm_lamina.config import LaminaConfig

YAML = """\
model: {model}
max-model-len: 512
executor: lamina
lamina-memory: 64MiB
lamina-batches: 1
"""


def test_routes(configure: Callable[[dict[str, Any]], Any], model_zoo: ModelZoo, tmp_path: Path) -> None:
    model, file = model_zoo("llama"), tmp_path / "engine.yaml"
    file.write_text(YAML.format(model=model))
    options = {"memory": "64MiB", "batches": 1}
    flags = ["--executor", "lamina", "--lamina-memory", "64MiB", "--lamina-batches", "1"]
    backend = ["--distributed-executor-backend", EXECUTOR]
    additional = ["--additional-config", json.dumps({"lamina": options})]
    outcomes = configure(
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
        }
    )
    for name, outcome in outcomes.items():
        assert outcome["backend"] == EXECUTOR, name
        assert outcome["additional_config"] == {"lamina": options}, name


def test_help_explains_every_option(log: Path) -> None:
    finished = run(console("vllm", "serve", "--help=lamina"), log)
    assert finished.status == 0
    text = re.sub(r"\s+", " ", finished.output)
    assert "--executor {lamina}" in text
    for field in dataclasses.fields(LaminaConfig):
        assert "--lamina-" + field.name.replace("_", "-") in text
        assert field.metadata["help"].replace("%%", "%") in text
