"""What vLLM's kernels need of Triton's interpreter to run in it, and to run in seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


def register() -> None:
    """vLLM calls it in each of its processes, as a general plugin."""
    from triton.runtime import interpreter
    from vllm.v1.sample.ops import topk_topp_sampler

    def boolean(mask: Any) -> Any:
        if mask is None or mask.data.dtype == np.bool_:
            return mask
        return interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    # The interpreter wants masks of bool, where Triton's compilers take any integer, as in vLLM's grammar kernel.
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load = lambda self, p, mask, *rest: load(self, p, boolean(mask), *rest)
    builder.create_masked_store = lambda self, p, value, mask, *rest: store(
        self, p, value, boolean(mask), *rest
    )
    # A third of the time goes into asking whether each sum overflows.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    # vLLM's kernel of top-k and top-p uses what the interpreter lacks; its way without Triton gives the same.
    topk_topp_sampler.HAS_TRITON = False
