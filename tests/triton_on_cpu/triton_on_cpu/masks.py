"""Masks of integers: Triton's compilers take them, its interpreter does not. vLLM's grammar kernel has one (int1)."""

from typing import Any

import numpy as np


def register() -> None:
    """Let the interpreter take them. vLLM calls it in each of its processes, as a general plugin."""
    from triton.runtime import interpreter

    def boolean(mask: Any) -> Any:
        if mask is None or mask.data.dtype == np.bool_:
            return mask
        return interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load = lambda self, p, mask, *rest: load(self, p, boolean(mask), *rest)
    builder.create_masked_store = lambda self, p, value, mask, *rest: store(
        self, p, value, boolean(mask), *rest
    )
