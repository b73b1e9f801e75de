"""What an engine with `--executor lamina` and nothing else is configured to be on an H100, computed without one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import runners
from models import ModelZoo

Outcomes = dict[str, dict[str, Any]]

pytest.importorskip(
    "triton", reason="vLLM's V2 model runner needs Triton, which is installed on GPU machines"
)

LAMINA = {"executor": "lamina", "lamina_memory": "64MiB"}
LAYERED = ("gpt_oss", "gemma3", "llama4")
"""Models whose layers are of several kinds. For Gemma 4 vLLM asks its FlashAttention, which a CPU does not have."""

INPUTS = "qwen2_audio"
"""A multimodal model."""

# Arguments beside LAMINA, the environment, and the message.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "V1": ({}, {runners.SWITCH: "0"}, f"V1 model runner on GPUs, .*: unset {runners.SWITCH}"),
    "block size": ({"block_size": 16}, {}, "not a multiple of 32, .*: remove --block-size or choose 32"),
    "backend": (
        {"attention_backend": "FLASH_ATTN"},
        {},
        "its own attention backend; remove --attention-backend",
    ),
    "backend by configuration": (
        {"attention_config": {"backend": "FLASH_ATTN"}},
        {},
        "its own attention backend; remove --attention-config",
    ),
    "scheduler": (
        {"scheduler_cls": "a.Scheduler"},
        {},
        "its own scheduler; remove --scheduler-cls a.Scheduler",
    ),
    "batches": (
        {"tensor_parallel_size": 2, "lamina_batches": 2},
        {},
        "two batches in flight with tensor parallelism on GPUs, .*: use --lamina-batches 1",
    ),
    "inputs": (
        {"model": INPUTS},
        {},
        "multimodal inputs on GPUs, .*: serve the model for text alone with --language-model-only",
    ),
    "worker": ({"worker_cls": "a.Worker"}, {}, "its own model worker; remove --worker-cls .*a.Worker"),
}


@pytest.fixture(scope="module")
def outcomes(configure: Callable[..., Outcomes], model_zoo: ModelZoo) -> Outcomes:
    """All cases of this file, by name."""
    model = {"model": model_zoo("llama"), "max_model_len": 512}
    cases = {
        "stock": {"arguments": model},
        "lamina": {"arguments": model | LAMINA},
        "given": {"arguments": model | LAMINA | {"block_size": 64, "async_scheduling": False}},
        "asked for": {"arguments": model | LAMINA | {"async_scheduling": True}},
        **{name: {"arguments": model | LAMINA | {"model": model_zoo(name)}} for name in LAYERED},
        "ranks": {"arguments": model | LAMINA | {"tensor_parallel_size": 2}},
        "text alone": {
            "arguments": model | LAMINA | {"model": model_zoo(INPUTS), "language_model_only": True}
        },
    }
    for name, (arguments, environment, _) in REFUSED.items():
        given = model | LAMINA | arguments
        cases[name] = {"arguments": given | {"model": model_zoo(INPUTS)} if "model" in arguments else given}
        cases[name]["environment"] = environment
    environment = runners.environment(runners.V2)
    del environment[runners.SWITCH]
    return configure(cases, "on_h100.py", **environment)


def test_what_vllm_configures(outcomes: Outcomes) -> None:
    assert outcomes["stock"]["chosen"] == {
        "device": "cuda",
        "V2": True,
        "block size": 16,
        "attention backend": None,
        "scheduler": None,
        "asynchronous": True,
    }


def test_what_lamina_needs(outcomes: Outcomes) -> None:
    assert outcomes["lamina"].get("chosen") == {
        "device": "cuda",
        "V2": True,
        "block size": 128,
        "attention backend": "CUSTOM",
        "class": "LaminaAttentionBackend",
        "graphs": "FULL_AND_PIECEWISE",
        "scheduler": "vllm_lamina.scheduler.scheduler.LaminaScheduler",
        "asynchronous": False,
    }, outcomes["lamina"]


@pytest.mark.parametrize(
    "line",
    [
        r"KV blocks hold 128 tokens \(--block-size\)",
        r"own attention backend is used \(--attention-backend CUSTOM\)",
        r"own scheduler is used \(--scheduler-cls .*\)",
        "Async scheduling will be disabled",
    ],
)
def test_each_change_is_a_line_in_the_log(outcomes: Outcomes, line: str) -> None:
    [logged] = [text for text in outcomes["lamina"]["log"] if re.search(line, text)]
    assert "\n" not in logged


def test_what_a_user_gives_is_kept(outcomes: Outcomes) -> None:
    assert outcomes["given"]["chosen"]["block size"] == 64
    assert not any(re.search("KV blocks hold|Async", text) for text in outcomes["given"]["log"])


def test_asynchronous_scheduling_has_no_effect(outcomes: Outcomes) -> None:
    assert outcomes["asked for"]["chosen"] == outcomes["lamina"]["chosen"]
    assert any("--async-scheduling has no effect" in text for text in outcomes["asked for"]["log"])


@pytest.mark.parametrize("name", LAYERED)
def test_layers_of_several_kinds_need_nothing_else(outcomes: Outcomes, name: str) -> None:
    assert outcomes[name].get("chosen") == outcomes["lamina"]["chosen"], outcomes[name]


def test_a_multimodal_model_serves_text_alone(outcomes: Outcomes) -> None:
    assert outcomes["text alone"].get("chosen") == outcomes["lamina"]["chosen"], outcomes["text alone"]


def test_ranks_have_one_batch(outcomes: Outcomes) -> None:
    assert "chosen" in outcomes["ranks"], outcomes["ranks"]
    assert any("one batch is in flight" in text for text in outcomes["ranks"]["log"])
    assert not any("one batch is in flight" in text for text in outcomes["lamina"]["log"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_user_gives_is_refused_by_name(outcomes: Outcomes, name: str) -> None:
    assert "error" in outcomes[name], "was accepted"
    assert re.search(REFUSED[name][2], outcomes[name]["message"])
