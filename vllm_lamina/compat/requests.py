"""Requests that would end vLLM's own engine: each gets an error of its own, before it reaches the engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError

from vllm_lamina.compat.config import facts_of


def refuse_fatal_requests(config: VllmConfig) -> None:
    """Let the front ends that are built from ``config`` answer these as they answer any invalid parameter (400)."""
    from vllm.v1.engine.input_processor import InputProcessor

    facts_of(config).checks_requests = True
    if hasattr(InputProcessor, "lamina_wrapped"):
        return
    InputProcessor.lamina_wrapped = True
    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def process_with_lamina(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        if facts_of(self.vllm_config).checks_requests and request.sampling_params is not None:
            for check in _checks(self.vllm_config):
                check(request.sampling_params)
        return request

    InputProcessor.process_inputs = process_with_lamina


def _checks(config: VllmConfig) -> Iterator[Callable[[Any], None]]:
    if config.lora_config is not None and config.device_config.device_type == "cpu":
        yield _no_log_probabilities_of_the_prompt
    if config.use_v2_model_runner:
        yield _within_the_tables_of_v2


def _no_log_probabilities_of_the_prompt(params: Any) -> None:
    """vLLM computes logits for all rows of a prompt, and on CPUs its adapters' matrix product for logits has one
    row for each request: it raises in the model worker.
    """
    for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(params, name, None) is not None:
            raise VLLMValidationError(
                f"{name} is not supported where models run on CPUs with --enable-lora: leave it out (in the "
                "completions API `echo` with `logprobs` asks for it too), or ask a server without --enable-lora",
                parameter=name,
            )


def _within_the_tables_of_v2(params: Any) -> None:
    """vLLM's V2 model runner keeps these in tables of so many columns, and raises in the model worker for more."""
    from vllm import envs
    from vllm.v1.worker.gpu.sample import logit_bias

    bad_words = params.bad_words_token_ids or ()
    stop_tokens = params.all_stop_token_ids if params.min_tokens > 0 else ()
    for name, what, count, limit in (
        (
            "allowed_token_ids",
            "token ids",
            len(params.allowed_token_ids or ()),
            logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS,
        ),
        ("logit_bias", "tokens", len(params.logit_bias or ()), logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS),
        (
            "stop_token_ids",
            "token ids, with min_tokens,",
            len(stop_tokens),
            logit_bias.MAX_NUM_STOP_TOKEN_IDS,
        ),
        ("bad_words", "words", len(bad_words), envs.VLLM_MAX_NUM_BAD_WORDS),
        ("bad_words", "tokens", sum(map(len, bad_words)), envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS),
    ):
        if count > limit:
            raise VLLMValidationError(
                f"{name} has {count} {what} where vLLM's V2 model runner takes at most {limit}: shorten it",
                parameter=name,
                value=count,
            )
