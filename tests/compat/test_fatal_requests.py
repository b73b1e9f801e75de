"""What ends vLLM's engine is refused before it reaches it, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams, envs
from vllm.exceptions import VLLMValidationError

from vllm_lamina.compat.requests import _checks

ADAPTERS = object()


def check(params: SamplingParams, *, v2: bool, lora: object = None, device: str = "cpu") -> None:
    config: Any = SimpleNamespace(
        lora_config=lora, device_config=SimpleNamespace(device_type=device), use_v2_model_runner=v2
    )
    for one in _checks(config):
        one(params)


def bad_words(*lengths: int) -> SamplingParams:
    params = SamplingParams()
    params._bad_words_token_ids = [[7] * length for length in lengths]
    return params


@pytest.mark.parametrize(
    ("name", "longest", "too_long"),
    [
        (
            "allowed_token_ids",
            SamplingParams(allowed_token_ids=list(range(1024))),
            SamplingParams(allowed_token_ids=list(range(1025))),
        ),
        (
            "logit_bias",
            SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0)),
            SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0)),
        ),
        (
            "stop_token_ids",
            SamplingParams(stop_token_ids=list(range(128)), min_tokens=1),
            SamplingParams(stop_token_ids=list(range(129)), min_tokens=1),
        ),
        (
            "bad_words",
            bad_words(*[1] * envs.VLLM_MAX_NUM_BAD_WORDS),
            bad_words(*[1] * (envs.VLLM_MAX_NUM_BAD_WORDS + 1)),
        ),
        (
            "bad_words",
            bad_words(envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS),
            bad_words(envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS, 1),
        ),
    ],
)
def test_tables_of_the_v2_runner(name: str, longest: SamplingParams, too_long: SamplingParams) -> None:
    check(longest, v2=True)
    with pytest.raises(VLLMValidationError, match=f"^{name} has .* at most .*: shorten it"):
        check(too_long, v2=True)
    check(too_long, v2=False)


def test_stop_tokens_without_min_tokens() -> None:
    """They are looked at on the host then."""
    check(SamplingParams(stop_token_ids=list(range(500))), v2=True)


def test_log_probabilities_of_the_prompt() -> None:
    params = SamplingParams(prompt_logprobs=1)
    with pytest.raises(VLLMValidationError, match=r"prompt_logprobs is not supported .* --enable-lora"):
        check(params, v2=False, lora=ADAPTERS)
    check(params, v2=False)
    check(params, v2=True, lora=ADAPTERS, device="cuda")
