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
    _make_fast(interpreter)
    # vLLM's kernel of top-k and top-p uses what the interpreter lacks; its way without Triton gives the same.
    topk_topp_sampler.HAS_TRITON = False


def _make_fast(interpreter: Any) -> None:
    """Does once what the interpreter does at each launch and sum; a third of the time that a step takes."""
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    translate, np_dtype, translated, np_dtypes = interpreter._patch_lang, interpreter._get_np_dtype, set(), {}

    class Stays:
        def restore(self) -> None:
            pass

    def translate_once(function: Any) -> Stays:
        """Triton's language in the interpreter's terms, for the modules that a kernel sees."""
        if id(function.__globals__) not in translated:
            translate(function)
            translated.add(id(function.__globals__))
        return Stays()

    def cached_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = translate_once, cached_np_dtype
