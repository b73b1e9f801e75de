"""Requests of random parameters on engines of random shapes: what stock vLLM and Lamina answer must be the same."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import runners
from comparison import FLOAT32_TOLERANCE, assert_same_phase, assert_same_until_aborted
from engines import Engines
from hybrid_specs import HYBRID
from jobs import Job, Phase, Request, RequestResult
from model_specs import (
    EXPANDED,
    EXPANDED_IN_STOCK,
    LATENT,
    LAYERED,
    PLAIN_ROTARY,
    SUPPORTED,
    TOLERANCES,
)
from models import ATTENTION_MODULES, EOS, MLP_MODULES, ModelZoo, create_adapter
from safetensors import safe_open
from workloads import greedy, prompt

VOCABULARY = range(4, 1024)
PRINTABLE = [chr(code) for code in range(33, 127)]
GRAMMARS: list[dict[str, Any]] = [
    {"regex": "([0-9]{1,3} ){1,9}"},
    {"choice": ["attention", "model", "a staggered batch"]},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    {"grammar": 'root ::= [a-c] | "(" root ")"'},
]
PREFIX = prompt(200, seed=1)
WITHOUT_ADAPTERS = {"gemma3n", "granitemoehybrid", "mimo_v2", "zamba2"}
"""Models that vLLM takes none for on a CPU; see `make_adapters` for others."""


def _either(rng: random.Random, chance: float, **params: Any) -> dict[str, Any]:
    return params if rng.random() < chance else {}


def params(rng: random.Random, max_tokens: int) -> dict[str, Any]:
    """Parameters of a request, each of vLLM's among them now and then; what is drawn at random is seeded."""
    chosen = greedy(rng.randint(1, max_tokens), logprobs=rng.choice([None, 0, 1, 2, 2, 2, 5]))
    if rng.random() < 0.4:
        chosen |= {"temperature": rng.choice([0.3, 1.0, 1.7]), "seed": rng.randrange(100)}
        chosen |= _either(rng, 0.3, top_k=rng.choice([1, 5, 100]))
        chosen |= _either(rng, 0.3, top_p=rng.choice([0.1, 0.9]))
        chosen |= _either(rng, 0.3, min_p=0.05)
        chosen |= _either(rng, 0.2, n=2)
    chosen |= _either(rng, 0.2, presence_penalty=0.7)
    chosen |= _either(rng, 0.2, frequency_penalty=-0.4)
    chosen |= _either(rng, 0.2, repetition_penalty=1.3)
    chosen |= _either(rng, 0.2, logit_bias={str(rng.choice(VOCABULARY)): 5.0, str(EOS): 1.0})
    chosen |= _either(rng, 0.2, bad_words=rng.sample(PRINTABLE, 40))
    chosen |= _either(rng, 0.2, min_tokens=chosen["max_tokens"] // 2)
    chosen |= _either(rng, 0.2, stop=["za", "ke"], include_stop_str_in_output=rng.random() < 0.5)
    chosen |= _either(rng, 0.2, stop_token_ids=rng.sample(VOCABULARY, 60))
    chosen |= _either(rng, 0.2, ignore_eos=False)
    chosen |= _either(rng, 0.1, detokenize=False) if "stop" not in chosen else {}
    chosen |= _either(rng, 0.1, skip_special_tokens=False)
    chosen |= _either(rng, 0.1, spaces_between_special_tokens=False)
    chosen |= _either(rng, 0.1, skip_reading_prefix_cache=True)
    chosen |= _either(rng, 0.1, prompt_logprobs=2)
    chosen |= _either(rng, 0.1, repetition_detection={"max_pattern_size": 3, "min_count": 3})
    chosen |= _either(rng, 0.2, extra_args={"no_repeats": rng.randint(1, 8)})
    if rng.random() < 0.2:
        chosen |= {"structured_outputs": rng.choice(GRAMMARS), "ignore_eos": False}
        for other in ("min_tokens", "bad_words", "logit_bias", "extra_args", "stop_token_ids"):
            chosen.pop(other, None)  # may leave no token that the grammar allows
    else:
        chosen |= _either(rng, 0.3, allowed_token_ids=sorted(rng.sample(VOCABULARY, 700)))
    return chosen


def requests(rng: random.Random, number: int, max_tokens: int, adapters: list[str]) -> list[Request]:
    made = []
    for _ in range(number):
        length = rng.choice([1, 2, 5, 31, 32, 33, 60, 129, 250])
        made.append(
            Request(
                PREFIX + prompt(length % 40, rng.randrange(9))
                if rng.random() < 0.2
                else prompt(length, rng.randrange(99)),
                params(rng, max_tokens),
                after_step=rng.randrange(2 * number),
                abort_after=rng.randint(1, max_tokens) if rng.random() < 0.25 else None,
                abort_delay=rng.randint(0, 2),
                adapter=rng.choice([None, *adapters]),
            )
        )
    return made


def jobs(
    seed: int, runner: str, number: int, max_tokens: int, model: str, adapters: list[str]
) -> tuple[Job, Job]:
    """What stock and Lamina are to do."""
    rng = random.Random(seed)
    adapters = adapters if rng.random() < 0.5 else []
    made = requests(rng, number, max_tokens, adapters)
    if adapters:
        # Stock vLLM 0.32 on CPU fails where a prompt's log-probabilities are asked for and adapters are there.
        made = [replace(one, params=one.params | {"prompt_logprobs": None}) for one in made]
    phase = Phase("fuzz", made)
    # One slot more than adapters, and prompts in one piece: vLLM 0.32 on CPU fails otherwise (see tests/equality).
    engine = {
        "max_model_len": 512,
        "enable_lora": bool(adapters),
        "max_loras": len(adapters) + 1,
        "logits_processors": [runners.logits_processor("NoRepeats", runner)],
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    family = Path(model).name
    judge = EXPANDED if family in EXPANDED_IN_STOCK else {}
    stock = Job(model, [_with_margins(phase)], engine, runner=runner, environment=judge)
    options = {
        "max_num_batched_tokens": rng.choice([64, 100, 256]),
        "max_num_seqs": rng.choice([2, 5, 12]),
        "block_size": rng.choice([32, 64]),
        "enable_prefix_caching": rng.random() < 0.7,
        "lamina_batches": rng.choice([1, 2, 2, 2]),
    }
    memory = rng.choice([1, 2, 8])
    if family in HYBRID:
        options["enable_prefix_caching"] = engine["enable_prefix_caching"] = False
    if family in HYBRID or family in LATENT:
        engine["compilation_config"] = PLAIN_ROTARY
    if family != "llama":
        memory += 5  # a request of 512 tokens takes more than 1 MiB
    lamina = replace(
        stock,
        phases=[phase],
        executor="lamina",
        engine=engine | options,
        kv_memory_mib=memory,
        environment={},
        random_lanes=seed,
    )
    return stock, lamina


def _with_margins(phase: Phase) -> Phase:
    """The same, and each request with the log-probabilities that say how near the choice of a token was."""
    requests = [
        replace(one, params=one.params | {"logprobs": max(2, one.params["logprobs"] or 0)})
        for one in phase.requests
    ]
    return replace(phase, requests=requests)


def _with_margins_of(stock: RequestResult, lamina: RequestResult, request: Request) -> RequestResult:
    """Lamina's answer, with stock's log-probabilities where the request asked for none."""
    if request.params["logprobs"] is not None:
        return lamina
    assert not any(one.logprobs for one in lamina.completions)
    assert request.abort_after is not None or len(lamina.completions) == len(stock.completions)
    completions = [
        replace(one, logprobs=other.logprobs[: len(one.token_ids)])
        for one, other in zip(lamina.completions, stock.completions, strict=False)
    ]
    return replace(lamina, completions=completions)


def check(engines: Engines, stock: Job, lamina: Job) -> dict[str, int]:
    """Compare them; returns what was counted of Lamina's engine."""
    expected, actual = engines.run(stock, 600), engines.run(lamina, 600)
    theirs, ours = expected.phase("fuzz"), actual.phase("fuzz")
    asked = lamina.phases[0].requests
    answers = list(map(_with_margins_of, theirs.requests, ours.requests, asked))
    tolerance = TOLERANCES.get(Path(stock.model).name, FLOAT32_TOLERANCE)
    if stock.engine["enable_lora"]:
        tolerance *= 2  # adapters enlarge what is rounded: with them stock is up to 1e-4 from float64
    whole = [i for i, request in enumerate(asked) if request.abort_after is None]
    assert_same_phase(
        replace(theirs, requests=[theirs.requests[i] for i in whole]),
        replace(ours, requests=[answers[i] for i in whole]),
        tolerance,
    )
    for one, other in zip(theirs.requests, answers, strict=True):
        for completion, same in zip(one.completions, other.completions, strict=False):
            assert_same_until_aborted(completion, same, tolerance)
    return actual.counts | {"preemptions": ours.preemptions}


def make_adapters(model: str, root: Path) -> list[str]:
    """None where stock vLLM takes none on a CPU: of models with experts, or whose projections are not Llama's."""
    if Path(model).name in WITHOUT_ADAPTERS:
        return []
    with safe_open(Path(model, "model.safetensors"), "pt") as weights:
        names = list(weights.keys())
    if any("expert" in name for name in names) or not any(name.endswith(".q_proj.weight") for name in names):
        return []
    modules = (ATTENTION_MODULES + MLP_MODULES, ("q_proj", "v_proj"))
    return [
        str(create_adapter(Path(model), root / f"adapter-{i}", 4, chosen, seed=i))
        for i, chosen in enumerate(modules)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=32, help="this many, from --first on (default: 32)")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--runner", choices=[runners.V1, runners.V2], default=runners.DEFAULT)
    parser.add_argument("--model", choices=[*SUPPORTED, *LAYERED, *LATENT, *HYBRID], default="llama")
    parser.add_argument("--requests", type=int, default=60, help="of each seed (default: 60)")
    parser.add_argument("--max-tokens", type=int, default=24, help="of each request (default: 24)")
    arguments = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory(prefix="lamina-fuzz-") as directory:
        root = Path(directory)
        model = ModelZoo(root)(arguments.model)
        adapters = make_adapters(model, root)
        with Engines(root) as engines:
            for seed in range(arguments.first, arguments.first + arguments.seeds):
                begin = time.monotonic()
                made = jobs(seed, arguments.runner, arguments.requests, arguments.max_tokens, model, adapters)
                try:
                    result = str(check(engines, *made))
                except AssertionError as error:
                    failed.append(seed)
                    result = f"FAILED: {error}"
                print(f"seed {seed}: {result} ({time.monotonic() - begin:.0f} s)", flush=True)
    print(f"{arguments.seeds - len(failed)} of {arguments.seeds} seeds equal stock vLLM's; failed: {failed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
