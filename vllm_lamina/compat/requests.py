"""Requests that would end vLLM's own engine: each gets an error of its own, before it reaches the engine."""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import VllmConfig

from vllm_lamina.compat.config import facts_of


def refuse_fatal_requests(config: VllmConfig) -> None:
    """Let the front ends that are built from ``config`` answer these as they answer any invalid parameter (400).

    Log-probabilities of the prompt, with LoRA on a CPU: vLLM computes logits for all rows of a prompt, and its
    adapters' matrix product for logits on CPUs has one row for each request. That raises in the model worker.
    """
    if config.lora_config is None or config.device_config.device_type != "cpu":
        return
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    facts_of(config).refuses_prompt_logprobs = True
    if hasattr(InputProcessor, "lamina_wrapped"):
        return
    InputProcessor.lamina_wrapped = True
    validate = InputProcessor._validate_params

    @functools.wraps(validate)
    def validate_with_lamina(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if facts_of(self.vllm_config).refuses_prompt_logprobs:
            for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
                if getattr(params, name, None) is not None:
                    raise VLLMValidationError(
                        f"{name} is not supported where models run on CPUs with --enable-lora: leave it out (`echo` "
                        "with `logprobs` asks for it too), or ask a server without --enable-lora",
                        parameter=name,
                    )
        return validate(self, params, *args, **kwargs)

    InputProcessor._validate_params = validate_with_lamina
