"""The kernels of the exchange, to be interpreted or to be compiled, whatever the environment says of Triton."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import triton

SOURCE = Path(__file__).parent.parent.parent / "vllm_lamina" / "device" / "exchange_kernels.py"


@cache
def exchange_kernels(*, interpreted: bool) -> ModuleType:
    """A module of its own: which of both a kernel is, is settled when its module is imported."""
    spec = importlib.util.spec_from_file_location(f"exchange_kernels_{interpreted=}", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpreted
        spec.loader.exec_module(module)
    return module
