"""An engine that cannot work with Lamina is refused before anything starts, by name and with what to change."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models import UNSUPPORTED, ModelZoo
from programs import TINY_ENGINE, Finished, console, run

from vllm_lamina.compat.arguments import EXECUTOR

NOT_LISTENING = "127.0.0.1:1"

# Feature and advice in the message about each of the models that Lamina does not run.
MODELS = {
    "soft_cap": ("sliding window attention|soft-capping", "without --executor lamina"),
    "sliding_window": ("sliding window attention", "--disable-sliding-window"),
    "mla": ("multi-head latent attention", "without --executor lamina"),
    "sinks": ("attention sinks", "without --executor lamina"),
    "alibi": ("ALiBi", "without --executor lamina"),
    "encoder_only": ("pooling models", "without --executor lamina"),
    "encoder_decoder": ("encoder-decoder models", "without --executor lamina"),
}

# Arguments of the engine: feature and advice in the message.
FEATURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "fp8": ({"kv_cache_dtype": "fp8"}, "quantised KV cache", "remove --kv-cache-dtype"),
    "speculative": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative decoding",
        "remove --speculative-config",
    ),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "KV connectors",
        "remove --kv-transfer-config",
    ),
    "offloading": ({"kv_offloading_size": 1.0}, "KV connectors|KV offloading", "remove --kv-"),
    "data": ({"data_parallel_size": 2}, "data parallelism", "--data-parallel-size 1"),
    "block size": ({"block_size": 16}, "not a multiple of 32", "choose 32, 64 or 128"),
}

# Arguments of the engine: the message.
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    # vLLM is faster here: it knows no executor of others that has a pipeline.
    "pipeline": (
        {"executor": "lamina", "pipeline_parallel_size": 2},
        "Pipeline Parallelism without .* is not supported",
    ),
    # And from 0.33 on here.
    "other dtype": (
        {"executor": "lamina", "kv_cache_dtype": "bfloat16", "enforce_eager": True},
        "a KV cache dtype other than the model's.*: remove --kv-cache-dtype|set `--kv-cache-dtype` to `auto`",
    ),
    "memory": (
        {"executor": "lamina", "lamina_memory": "1MiB", "max_model_len": 8192},
        r"pool of 1 MiB holds \d+ tokens, but one request of --max-model-len 8192 needs .*: raise --lamina-memory",
    ),
    "too much memory": (
        {"executor": "lamina", "lamina_memory": "1000TiB"},
        "lamina option 'memory': 1000 TiB is more than this host has",
    ),
    "unreachable": (
        {"executor": "lamina", "lamina_workers": NOT_LISTENING},
        f"no attention worker answered at {NOT_LISTENING} .*; start one with `vllm-lamina worker`",
    ),
    "no secret": (
        {"executor": "lamina", "lamina_workers": "192.0.2.1:7100"},
        "the attention worker at 192.0.2.1:7100 is reached over the network and needs a secret",
    ),
    "no secret file": (
        {"executor": "lamina", "lamina_workers": "192.0.2.1:7100", "lamina_secret_file": "/no/such/file"},
        r"the secret file '/no/such/file' cannot be read \(No such file or directory\)",
    ),
    "model workers on Ray": (
        {"executor": "lamina", "distributed_executor_backend": "ray"},
        "--distributed-executor-backend ray would run the model workers on Ray, .*: remove it; --lamina-ray",
    ),
    "no Ray cluster": (
        {"executor": "lamina", "lamina_ray": NOT_LISTENING, "lamina_memory": "64MiB"},
        rf"no Ray cluster can be reached at {NOT_LISTENING} \(.*\); start one \(`ray start --head`\)",
    ),
    "attention workers on Ray for half of the ranks": (
        {"executor": "lamina", "lamina_ray": "auto", "lamina_memory": "64MiB", "tensor_parallel_size": 2},
        "choose a multiple of it for --lamina-ray-workers, not 1",
    ),
    "unknown keyword": (
        {"executor": "lamina", "lamina_memroy": "1GiB"},
        "unknown lamina option 'memroy'; did you mean 'memory'",
    ),
    "unknown key": (
        {"distributed_executor_backend": EXECUTOR, "additional_config": {"lamina": {"worker_cpu": "1"}}},
        "unknown lamina option 'worker_cpu'; did you mean 'worker_cpus'",
    ),
    "without executor": ({"lamina_memory": "1GiB"}, "--lamina-memory needs --executor lamina"),
    "key without executor": (
        {"additional_config": {"lamina": {"memory": "1GiB"}}},
        r'additional_config\["lamina"\] needs --executor lamina',
    ),
}

FILE = "engine.yaml"
"""Written beside the test's other files."""

# Arguments of `vllm serve MODEL`: the message.
FLAGS: dict[str, tuple[list[str], str]] = {
    "unknown flag": (
        ["--executor", "lamina", "--lamina-memroy", "1GiB"],
        "unknown option --lamina-memroy; did you mean --lamina-memory",
    ),
    "unknown key in a file": (
        ["--config", FILE],
        "unknown option --lamina-memroy; did you mean --lamina-memory",
    ),
    "flag without executor": (["--lamina-memory", "1GiB"], "--lamina-memory needs --executor lamina"),
    "flag with a wrong value": (
        ["--executor", "lamina", "--lamina-memory", "lots"],
        "lamina option 'memory': 'lots' is not a size",
    ),
    "unknown executor": (["--executor", "laminar"], "invalid choice: 'laminar'"),
}

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(
    configure: Callable[[dict[str, Any]], Outcomes],
    model_zoo: ModelZoo,
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcomes:
    """All cases of this file, by name."""
    file = tmp_path_factory.mktemp("refusals") / FILE
    file.write_text("executor: lamina\nlamina-memroy: 1GiB\n")
    llama = {"model": model_zoo("llama"), "dtype": "float32", "max_model_len": 512}
    lamina = {"executor": "lamina", "enforce_eager": True}
    return configure(
        {name: {"arguments": lamina | {"model": model_zoo(name)}} for name in MODELS}
        | {name: {"arguments": llama | lamina | arguments} for name, (arguments, *_) in FEATURES.items()}
        | {name: {"arguments": llama | arguments} for name, (arguments, _) in OPTIONS.items()}
        | {
            name: {
                "command": ["serve", llama["model"], *(str(file) if flag == FILE else flag for flag in flags)]
            }
            for name, (flags, _) in FLAGS.items()
        }
        | {"supported": {"arguments": llama | lamina}}
    )


def test_every_unsupported_model_is_here() -> None:
    assert MODELS.keys() == UNSUPPORTED.keys()


def test_a_supported_engine_is_accepted(outcomes: Outcomes) -> None:
    assert outcomes["supported"]["backend"] == EXECUTOR


@pytest.mark.parametrize("name", [*MODELS, *FEATURES])
def test_feature(outcomes: Outcomes, name: str) -> None:
    feature, advice = MODELS[name] if name in MODELS else FEATURES[name][1:]
    assert "error" in outcomes[name], "was accepted"
    assert re.search(f"Lamina does not support .*({feature}).*{advice}", outcomes[name]["message"])


@pytest.mark.parametrize("name", [*OPTIONS, *FLAGS])
def test_option(outcomes: Outcomes, name: str) -> None:
    message = (OPTIONS | FLAGS)[name][1]
    assert "error" in outcomes[name], "was accepted"
    assert re.search(message, outcomes[name]["message"])


@pytest.fixture
def something_else() -> Iterator[str]:
    """The address of a program that listens and is not an attention worker."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_the_reason_is_the_last_line_of_the_server(
    model_zoo: ModelZoo, something_else: str, tmp_path: Path
) -> None:
    def serve(name: str, *flags: str) -> Finished:
        command = console("vllm", "serve", model_zoo(name), *TINY_ENGINE, "--executor", "lamina", *flags)
        return run(command, tmp_path / f"{name}.log")

    ended = serve("alibi")
    assert ended.status != 0
    assert "Lamina does not support ALiBi" in ended.last_line

    ended = serve("llama", "--lamina-workers", something_else)
    assert ended.status != 0
    assert f"no attention worker answered at {something_else}" in ended.last_line
