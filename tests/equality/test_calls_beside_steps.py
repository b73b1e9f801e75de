"""A call that writes the model's weights while lanes compute: every step has the weights before it or those after it.

Stock vLLM runs one batch, so its call comes when each request has exactly k tokens; Lamina's comes when the lanes'
requests have different numbers of them. So each request of Lamina's must be stock's for one k, and that k is what had
been begun when the call was made.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runners
from comparison import FLOAT32_TOLERANCE, assert_close, first_divergence
from engines import Engines
from jobs import Call, Completion, Job, Phase, PhaseResult
from models import ModelZoo
from safetensors.torch import load_file, save_file
from weights import SCALED
from workloads import requests

AFTER_TOKENS = 8
REQUESTS = requests((3, 20, 7, 33, 12, 5), max_tokens=16)
FACTOR = 2.0  # and 1 / 2 takes it back to the bit


@pytest.fixture(scope="module")
def scaled(model_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the weights that `weights.scale_slowly` makes of the model's."""
    directory = tmp_path_factory.mktemp("scaled")
    for file in Path(model_zoo("four_kv_heads")).glob("*.safetensors"):
        weights = load_file(file)
        for name, weight in weights.items():
            if name.endswith(SCALED):
                weight.mul_(FACTOR)
        save_file(weights, directory / file.name)
    return directory


def job(model_zoo: ModelZoo, phases: list[Phase], **more: Any) -> Job:
    engine = {"worker_extension_cls": "weights.Writer", "enable_prefix_caching": False, "block_size": 32}
    return Job(model_zoo("four_kv_heads"), phases, engine | more)


def phase(tokens: int, method: str, there: dict[str, Any], back: dict[str, Any]) -> Phase:
    """The weights are others from so many tokens on, and as they were at the end."""
    calls = [Call(method, there, tokens), Call(method, back, 1000)]
    return Phase(f"{method} after {tokens}", REQUESTS, calls)


@pytest.fixture(scope="module")
def stock(engines: Engines, model_zoo: ModelZoo) -> dict[int, PhaseResult]:
    """What stock vLLM generates if the weights change after so many tokens."""
    counts = range(AFTER_TOKENS - 3, AFTER_TOKENS + 4)
    phases = [phase(k, "write_weights", {"factor": FACTOR}, {"factor": 1 / FACTOR}) for k in counts]
    results = engines.run(job(model_zoo, phases)).phases
    for k, result in zip(counts, results, strict=True):
        assert result.tokens_at_calls[0] == [k] * len(REQUESTS)
    return dict(zip(counts, results, strict=True))


def same(stock: Completion, lamina: Completion) -> bool:
    if first_divergence(stock, lamina) is not None:
        return False
    try:
        assert_close(stock.logprobs, lamina.logprobs, FLOAT32_TOLERANCE, "")
    except AssertionError:
        return False
    return True


def assert_no_step_is_mixed(stock: dict[int, PhaseResult], lamina: PhaseResult) -> None:
    in_flight = 0
    for index, seen in enumerate(lamina.tokens_at_calls[0]):
        generated = lamina.requests[index].completions[0]
        changed = [k for k, result in stock.items() if same(result.requests[index].completions[0], generated)]
        assert len(changed) == 1, f"{lamina.name}: request {index} is stock's with a change after {changed}"
        assert changed[0] - seen in (0, 1), (
            f"{lamina.name}: request {index} had {seen}, changed after {changed}"
        )
        in_flight += changed[0] - seen
    assert in_flight, "no step was in flight"


@pytest.mark.parametrize(
    ("runner", "ranks"),
    [
        (runners.DEFAULT, 1),
        pytest.param(runners.DEFAULT, 2, marks=pytest.mark.slow),
        pytest.param(runners.V2, 1, marks=pytest.mark.slow),
    ],
)
def test_every_step_has_the_weights_before_or_after(
    engines: Engines,
    model_zoo: ModelZoo,
    scaled: Path,
    stock: dict[int, PhaseResult],
    runner: str,
    ranks: int,
) -> None:
    factors = {"factor": FACTOR}, {"factor": 1 / FACTOR}
    paths = {"weights_path": str(scaled)}, {"weights_path": model_zoo("four_kv_heads")}
    phases = [
        Phase("slow from here on", requests((1,)), [Call("slow_down_steps", {}, 1)]),
        phase(AFTER_TOKENS, "write_weights", *factors),
        phase(AFTER_TOKENS, "weights:scale_slowly", *factors),
        phase(AFTER_TOKENS, "reload_weights", *paths),
    ]
    lamina = replace(job(model_zoo, phases), executor="lamina", runner=runner)
    if ranks > 1:
        engine = lamina.engine | {"tensor_parallel_size": ranks}
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        lamina = replace(lamina, engine=engine, environment=environment)
    for result in engines.run(lamina).phases[1:]:
        assert_no_step_is_mixed(stock, result)
