"""An engine that cannot work with Lamina is refused before anything starts, by name and with what to change.

With the change that the message advises it is accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from model_specs import UNSUPPORTED
from models import ModelZoo
from programs import TINY_ENGINE, console, run

from vllm_lamina.compat.arguments import EXECUTOR
from vllm_lamina.support import REFUSALS

NOT_LISTENING = "127.0.0.1:1"


@dataclass(frozen=True)
class Case:
    """Arguments of an engine that are refused, what the message must say, and the change that it advises.

    ``change`` replaces arguments, those with None go; without one the advice is about something outside the engine.
    """

    arguments: dict[str, Any]
    message: str
    change: dict[str, Any] | None = None
    patience: float | None = None
    """See `configure.py`."""


WITHOUT_LAMINA = {"executor": None, "lamina_memory": None}


def feature(name: str, advice: str) -> str:
    return f"Lamina does not support .*({name}).*: .*{advice}"


def without_lamina(name: str) -> Case:
    return Case({}, feature(name, "run it without --executor lamina"), WITHOUT_LAMINA)


# Each of the models that Lamina does not run.
MODELS = {
    "prefix_lm": without_lamina("attention that is not causal"),
    "attention_free": without_lamina("attention-free models"),
    "head_size": without_lamina("head sizes other than"),
    "sparse": without_lamina("sparse attention by an indexer"),
    "latent_size": without_lamina("latent rows .* of other sizes"),
    "encoder_only": without_lamina("pooling models"),
    "encoder_decoder": without_lamina("encoder-decoder models"),
}

LAMINA = {"executor": "lamina", "enforce_eager": True, "lamina_memory": "64MiB"}
QUANTISED = "quantised_kv_cache"
"""The model called llama, whose checkpoint declares an FP8 KV cache."""
MAMBA = "nemotron_h"
"""A model that is served, of the zoo."""
STATES_CACHED = feature(
    "prefix caching for hybrid models",
    "use --no-enable-prefix-caching, and remove --mamba-cache-mode and --mamba-block-size",
)
INPUTS = "qwen2_audio"
"""A multimodal model."""
KV_DTYPE = r"--dtype bfloat16 --kv-cache-dtype bfloat16, or both float16"


def own_rule(**overrides: object) -> Case:
    """The model called llama, as the checkpoint of another one."""
    refused = feature("rules of attention that one model alone has", "without --executor lamina")
    return Case({"hf_overrides": overrides}, refused, WITHOUT_LAMINA)


# Features that arguments ask for.
FEATURES = {
    "chunks that look back": own_rule(
        architectures=["Rnj1ForCausalLM"], layer_types=["chunked_attention"] * 3
    ),
    "ALiBi of square roots": own_rule(architectures=["Step1ForCausalLM"]),
    "sink tokens": own_rule(param_sink_number=128),
    "layers that attend twice": own_rule(architectures=["IQuestLoopCoderForCausalLM"]),
    "fp8": Case(
        {"kv_cache_dtype": "fp8"},
        feature(r"quantised KV cache \(FP8", "remove --kv-cache-dtype"),
        {"kv_cache_dtype": None},
    ),
    "fp8 by the checkpoint": Case(
        {"model": QUANTISED},
        feature("the checkpoint declares", KV_DTYPE),
        {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"},
    ),
    "fp8 by both": Case(
        {"model": QUANTISED, "kv_cache_dtype": "fp8"},
        feature("the checkpoint declares", KV_DTYPE),
        {"dtype": "float16", "kv_cache_dtype": "float16"},
    ),
    # From vLLM 0.33 on it is faster here.
    "other dtype": Case(
        {"kv_cache_dtype": "bfloat16"},
        "a KV cache dtype other than the model's.*: remove --kv-cache-dtype|set `--kv-cache-dtype` to `auto`",
        {"kv_cache_dtype": None},
    ),
    "not causal": Case(
        {"attention_config": {"use_non_causal": True}},
        feature("attention that is not causal", "without --executor lamina"),
        WITHOUT_LAMINA,
    ),
    "prefix cache of states": Case(
        {"model": MAMBA, "enable_prefix_caching": True},
        STATES_CACHED,
        {"enable_prefix_caching": False},
    ),
    "states at the ends of blocks": Case(
        {"model": MAMBA, "mamba_cache_mode": "align"}, STATES_CACHED, {"mamba_cache_mode": None}
    ),
    "blocks of states": Case(
        {"model": MAMBA, "mamba_block_size": 256}, STATES_CACHED, {"mamba_block_size": None}
    ),
    "ReplaySSM": Case(
        {"model": MAMBA, "use_replayssm": True},
        feature("ReplaySSM", "remove --use-replayssm"),
        {"use_replayssm": None},
    ),
    "speculative": Case(
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        feature("speculative decoding", "remove --speculative-config"),
        {"speculative_config": None},
    ),
    "speculative by flags": Case(
        {"spec_method": "ngram", "spec_tokens": 2},
        feature("speculative decoding", "--spec-method.*--spec-tokens"),
        {"spec_method": None, "spec_tokens": None},
    ),
    "connector": Case(
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        feature("KV connectors", "remove --kv-transfer-config"),
        {"kv_transfer_config": None},
    ),
    "offloading": Case(
        {"kv_offloading_size": 1.0},
        feature("KV offloading", "remove --kv-offloading-size"),
        {"kv_offloading_size": None},
    ),
    "encoders apart": Case(
        {"ec_manager_config": {"encoder_cache_manager_cls": "a.Manager"}},
        feature("encoders apart from the decoder", "remove --ec-transfer-config, --ec-manager-config"),
        {"ec_manager_config": None},
    ),
    "chunks of whole inputs": Case(
        {
            "model": INPUTS,
            "hf_overrides": {"is_mm_prefix_lm": True},
            "long_prefill_token_threshold": 64,
        },
        feature(
            "a limit of prefill chunks for models whose images see their own tokens whole",
            "remove --long-prefill-token-threshold",
        ),
        {"long_prefill_token_threshold": None},
    ),
    "pipeline": Case(
        {"pipeline_parallel_size": 2},
        feature("pipeline parallelism", "use --pipeline-parallel-size 1"),
        {"pipeline_parallel_size": 1},
    ),
    "data": Case(
        {"data_parallel_size": 2},
        feature("data parallelism", "use --data-parallel-size 1"),
        {"data_parallel_size": 1},
    ),
    "context": Case(
        {"decode_context_parallel_size": 2},
        feature("context parallelism", "remove --decode-context-parallel-size"),
        {"decode_context_parallel_size": None},
    ),
    "fast prefill": Case(
        {"kv_sharing_fast_prefill": True},
        feature("prefill without the layers that share KV", "remove --kv-sharing-fast-prefill"),
        {"kv_sharing_fast_prefill": None},
    ),
    "block size": Case(
        {"block_size": 16},
        feature("not a multiple of 32", "remove --block-size or choose 32, 64 or 128"),
        {"block_size": 64},
    ),
}

OPTIONS = {
    # That what the message says is enough: partition/test_divide.py.
    "memory": Case(
        {"lamina_memory": "1MiB", "max_model_len": 8192},
        r"pool of 1 MiB holds \d+ tokens, but one request of --max-model-len 8192 needs .*: raise --lamina-memory",
        {"lamina_memory": "16MiB"},
    ),
    "memory of two ranks": Case(
        {"lamina_memory": "1MiB", "max_model_len": 8192, "tensor_parallel_size": 2},
        r"raise --lamina-memory, which 2 ranks share, to at least \d+\.\d MiB",
        {"lamina_memory": "16MiB"},
    ),
    "long requests": Case(
        {"lamina_memory": "1MiB", "max_model_len": 8192},
        r"pool of 1 MiB holds \d+ tokens.* or lower --max-model-len",
        {"max_model_len": 384},
    ),
    "too much memory": Case(
        {"lamina_memory": "1000TiB"},
        "lamina option 'memory': 1000 TiB is more than this host has, .*: choose less",
        {"lamina_memory": "64MiB"},
    ),
    "unreachable": Case(
        {"lamina_workers": NOT_LISTENING, "lamina_memory": "auto"},
        f"no attention worker answered at {NOT_LISTENING} .*; start one with `vllm-lamina worker`",
        patience=1.0,
    ),
    "memory of a worker": Case(
        {"lamina_workers": NOT_LISTENING},
        "'memory' and 'worker_cpus' describe the embedded attention worker; .* give them to `vllm-lamina worker`",
    ),
    "no secret": Case(
        {"lamina_workers": "192.0.2.1:7100", "lamina_memory": "auto"},
        "the attention worker at 192.0.2.1:7100 is reached over the network and needs a secret",
    ),
    "no secret file": Case(
        {
            "lamina_workers": "192.0.2.1:7100",
            "lamina_secret_file": "/no/such/file",
            "lamina_memory": "auto",
        },
        r"the secret file '/no/such/file' cannot be read \(No such file or directory\)",
    ),
    "model workers on Ray": Case(
        {"distributed_executor_backend": "ray"},
        "--distributed-executor-backend ray would run the model workers on Ray, .*: remove it; --lamina-ray",
        {"distributed_executor_backend": None},
    ),
    "another executor": Case(
        {"distributed_executor_backend": "mp"},
        "selects its own executor; remove --distributed-executor-backend mp",
        {"distributed_executor_backend": None},
    ),
    "another attention backend": Case(
        {"attention_backend": "CPU_ATTN"},
        "has its own attention backend; remove --attention-backend",
        {"attention_backend": None},
    ),
    "another attention backend by configuration": Case(
        {"attention_config": {"backend": "CPU_ATTN"}},
        "has its own attention backend; remove --attention-config",
        {"attention_config": None},
    ),
    "another model worker": Case(
        {"worker_cls": "a.Worker"},
        "has its own model worker; remove --worker-cls",
        {"worker_cls": None},
    ),
    "another scheduler": Case(
        {"scheduler_cls": "a.Scheduler"},
        "has its own scheduler; remove --scheduler-cls a.Scheduler",
        {"scheduler_cls": None},
    ),
    "no Ray cluster": Case(
        {"lamina_ray": NOT_LISTENING},
        rf"no Ray cluster can be reached at {NOT_LISTENING} \(.*\); start one \(`ray start --head`\)",
    ),
    "attention workers on Ray for half of the ranks": Case(
        {"lamina_ray": "auto", "tensor_parallel_size": 2},
        "choose a multiple of it for --lamina-ray-workers, not 1",
    ),
    "unknown keyword": Case(
        {"lamina_memroy": "1GiB"},
        "unknown lamina option 'memroy'; did you mean 'memory'",
        {"lamina_memroy": None, "lamina_memory": "1GiB"},
    ),
    "unknown key": Case(
        {
            "executor": None,
            "lamina_memory": None,
            "distributed_executor_backend": EXECUTOR,
            "additional_config": {"lamina": {"worker_cpu": "1"}},
        },
        "unknown lamina option 'worker_cpu'; did you mean 'worker_cpus'",
        {"additional_config": {"lamina": {"worker_cpus": "1"}}},
    ),
    "without executor": Case(
        {"executor": None}, "--lamina-memory needs --executor lamina", {"executor": "lamina"}
    ),
    "key without executor": Case(
        WITHOUT_LAMINA | {"additional_config": {"lamina": {"memory": "64MiB"}}},
        r'additional_config\["lamina"\] needs --executor lamina',
        {"executor": "lamina"},
    ),
}

CASES = MODELS | FEATURES | OPTIONS

# Layers alone say them (tests/test_support.py), or a GPU does (test_h100.py).
NOT_HERE = (
    "other attention options of the model",
    "multi-head latent attention (MLA) on GPUs",
    "vLLM's V1 model runner on GPUs",
    "multimodal inputs on GPUs",
    "two batches in flight with tensor parallelism on GPUs",
    "hybrid models (Mamba, linear or convolution state beside attention) on GPUs",
)

OTHER_KV_DTYPE = "a KV cache dtype other than the model's"

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

HYBRID, HYBRID_SERVER = "hybrid", "a server of a hybrid model"

Outcomes = dict[str, dict[str, Any]]


def changed(name: str) -> str:
    """The name of the case with the change that its message advises."""
    return f"{name}, changed"


@pytest.fixture(scope="module")
def outcomes(
    configure: Callable[[dict[str, Any]], Outcomes],
    model_zoo: ModelZoo,
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcomes:
    """All cases of this file, by name."""
    directory = tmp_path_factory.mktemp("refusals")
    file = directory / FILE
    file.write_text("executor: lamina\nlamina-memroy: 1GiB\n")
    models = {
        MAMBA: model_zoo(MAMBA),
        INPUTS: model_zoo(INPUTS),
        QUANTISED: quantised(Path(model_zoo("llama")), directory / QUANTISED),
    }
    llama = {"model": model_zoo("llama"), "dtype": "float32", "max_model_len": 512}

    def arguments(*parts: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for part in parts for name, value in part.items()}
        given["model"] = models.get(given["model"], given["model"])
        return {"arguments": {name: value for name, value in given.items() if value is not None}}

    cases = {}
    for name, case in CASES.items():
        engine = {"model": model_zoo(name)} if name in MODELS else llama
        cases[name] = arguments(engine, LAMINA, case.arguments)
        if case.patience is not None:
            cases[name]["patience"] = case.patience
        if case.change is not None:
            cases[changed(name)] = arguments(engine, LAMINA, case.arguments, case.change)
    return configure(
        cases
        | {
            name: {
                "command": ["serve", llama["model"], *(str(file) if flag == FILE else flag for flag in flags)]
            }
            for name, (flags, _) in FLAGS.items()
        }
        | {
            "supported": arguments(llama, LAMINA),
            "asynchronous": arguments(llama, LAMINA, {"async_scheduling": True}),
            HYBRID: arguments(llama, LAMINA, {"model": MAMBA}),
            HYBRID_SERVER: {"command": ["serve", models[MAMBA], "--executor", "lamina"]},
        }
    )


def quantised(model: Path, directory: Path) -> str:
    """A model whose checkpoint declares an FP8 KV cache, in the form of compressed-tensors."""
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "quantization_status": "compressed",
        "config_groups": {},
        "kv_cache_scheme": scheme,
    }
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def test_every_unsupported_model_is_here() -> None:
    assert MODELS.keys() == UNSUPPORTED.keys()


def test_every_row_of_the_table_is_here(outcomes: Outcomes) -> None:
    messages = [outcomes[name]["message"] for name in CASES]
    for refusal in REFUSALS:
        if refusal.feature == OTHER_KV_DTYPE and any("`--kv-cache-dtype` to `auto`" in m for m in messages):
            continue  # vLLM 0.33 says so itself, and first
        shown = any(f"does not support {refusal.feature}," in message for message in messages)
        assert shown != (refusal.feature in NOT_HERE), refusal.feature


def test_a_supported_engine_is_accepted(outcomes: Outcomes) -> None:
    assert outcomes["supported"]["backend"] == EXECUTOR


def test_what_has_no_effect_is_accepted(outcomes: Outcomes) -> None:
    """As stock vLLM accepts it on CPUs."""
    accepted = outcomes["asynchronous"]
    assert accepted.get("chosen", accepted)["asynchronous"] is False
    assert any("--async-scheduling has no effect" in line for line in accepted["log"])


@pytest.mark.parametrize("name", [HYBRID, HYBRID_SERVER])
def test_a_hybrid_model_is_accepted_as_it_is(outcomes: Outcomes, name: str) -> None:
    """Although vLLM would cache prefixes."""
    assert "error" not in outcomes[name], outcomes[name]["message"]
    assert sum("prefix caching is off" in line for line in outcomes[name]["log"]) == 1
    assert not any("prefix caching is off" in line for line in outcomes["supported"]["log"])


@pytest.mark.parametrize("name", CASES)
def test_refused(outcomes: Outcomes, name: str) -> None:
    assert "error" in outcomes[name], "was accepted"
    assert re.search(CASES[name].message, outcomes[name]["message"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.change is not None])
def test_the_advice_helps(outcomes: Outcomes, name: str) -> None:
    assert "error" not in outcomes[changed(name)], outcomes[changed(name)]["message"]


@pytest.mark.parametrize("name", FLAGS)
def test_flag(outcomes: Outcomes, name: str) -> None:
    assert "error" in outcomes[name], "was accepted"
    assert re.search(FLAGS[name][1], outcomes[name]["message"])


def test_the_reason_is_the_last_line_of_the_server(model_zoo: ModelZoo, log: Path) -> None:
    """The same of one that asked an attention worker before: hosts/test_hosts_failures.py."""
    command = console("vllm", "serve", model_zoo("head_size"), *TINY_ENGINE, "--executor", "lamina")
    ended = run(command, log)
    assert ended.status != 0
    assert "Lamina does not support head sizes other than" in ended.last_line
