"""Parts of `benchmarks.gpu` with engines, each in a process of its own: equality with stock vLLM, decode steps."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_setup
from benchmarks.gpu_setup import Model, Row

SYSTEMS = {
    "stock": {},
    "one lane": {"executor": "lamina", "lamina_batches": 1},
    "two lanes": {"executor": "lamina", "lamina_batches": 2, "lamina_stagger": "always"},
}


def equality(report: Callable[[Row], None]) -> None:
    """Prompts of 1 to 3000 tokens, twice, so that the second time they are in the prefix cache."""
    model = _model("small", gpu_setup.SIZES.small)
    outputs = {
        name: _in_process("tokens", str(model), json.dumps(options)) for name, options in SYSTEMS.items()
    }
    for name in list(SYSTEMS)[1:]:
        report({"system": name, **compare(outputs["stock"], outputs[name])})


def compare(expected: list[Any], actual: list[Any]) -> Row:
    """How many outputs, [tokens, log-probabilities] each, have the same tokens; and how far the log-probabilities are
    apart up to the first token that differs.
    """
    equal, worst = 0, 0.0
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(expected, actual, strict=True):
        same = next(
            (i for i, pair in enumerate(zip(tokens, other_tokens, strict=True)) if pair[0] != pair[1]),
            len(tokens),
        )
        equal += same == len(tokens)
        distances = (abs(a - b) for a, b in zip(logprobs[:same], other_logprobs[:same], strict=True))
        worst = max([worst, *distances])
    return {"equal": f"{equal} of {len(expected)}", "log-probabilities apart": worst}


def steps(report: Callable[[Row], None]) -> None:
    """An 8B model's widths, half of its layers, random weights."""
    model = _model("big", gpu_setup.SIZES.big)
    for name, options in SYSTEMS.items():
        for row in _in_process("decode", str(model), json.dumps(options)):
            report({"system": name, **row})


def _tokens(model: str, options: str) -> list[Any]:
    llm = _engine(model, dtype="float32", **json.loads(options))
    rng = np.random.default_rng(0)
    prompts = [
        {"prompt_token_ids": rng.integers(5, 1000, length).tolist()} for length in gpu_setup.SIZES.prompts
    ]
    outputs = []
    for _ in range(2):
        for request in llm.generate(prompts, _params(gpu_setup.SIZES.compared, logprobs=1), use_tqdm=False):
            completion = request.outputs[0]
            logprobs = [next(iter(choices.values())).logprob for choices in completion.logprobs]
            outputs.append([list(completion.token_ids), logprobs])
    return outputs


def _decode(model: str, options: str) -> Iterator[Row]:
    begin = time.perf_counter()
    llm = _engine(model, dtype="bfloat16", load_format="dummy", **json.loads(options))
    started = time.perf_counter() - begin
    rng = np.random.default_rng(0)
    for batch in gpu_setup.SIZES.batches:
        prompts = [
            {"prompt_token_ids": rng.integers(5, 1000, gpu_setup.SIZES.context).tolist()}
            for _ in range(batch)
        ]

        def seconds(num_tokens: int, prompts: list[Any] = prompts) -> float:
            begin = time.perf_counter()
            llm.generate(prompts, _params(num_tokens), use_tqdm=False)
            return time.perf_counter() - begin

        seconds(2)
        # The prompts are in the prefix cache now: the difference is decoding.
        step = (seconds(gpu_setup.SIZES.decoded + 2) - seconds(2)) / gpu_setup.SIZES.decoded
        yield {"batch": batch, "step ms": step * 1e3, "started in s": started}


def _params(num_tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **more)


def _engine(model: str, **options: Any) -> Any:
    from vllm import LLM

    options |= {"lamina_memory": gpu_setup.SIZES.memory} if "executor" in options else gpu_setup.SIZES.stock
    return LLM(
        model,
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.5,
        seed=0,
        **gpu_setup.SIZES.engine,
        **options,
    )


def _model(name: str, model: Model) -> Path:
    """With random weights; of the big one the configuration alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = Path(os.environ.get("TMPDIR", "/tmp")) / f"lamina-gpu-{name}"
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads[0],
        num_key_value_heads=model.heads[1],
        head_dim=model.heads[2],
        max_position_embeddings=32768,
        initializer_range=0.05,
        architectures=["LlamaForCausalLM"],
    )
    if name == "small":
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(directory)
    else:
        config.save_pretrained(directory)
    return directory


def _in_process(function: str, *arguments: str) -> Any:
    """What one of `CALLED` returns, called in a process of its own: a GPU's memory is free again then."""
    command = [*gpu_setup.PROGRAM, "--call", function, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{function} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


CALLED = {"tokens": _tokens, "decode": _decode}
"""What runs in processes of its own, by the name that such a process is told."""
