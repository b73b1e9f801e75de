"""Lets torchvision, whose wheels are built for CUDA, be imported beside the CPU build of torch, and numba beside vLLM.

Python imports this at its start where the folder is on PYTHONPATH. torchvision describes two operators of its native
library, which does not load: they are declared before. Image processors use neither. llvmlite, which numba brings, has
an object that says it has any attribute: vLLM, which looks through all modules for its kernels, ends at it.
"""

from __future__ import annotations

import sys
from typing import Any


class _BeforeImports:
    """Does so as soon as torchvision or vLLM's search is imported, and finds no module itself."""

    operators: Any = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision" and self.operators is None:
            import torch

            self.operators = torch.library.Library("torchvision", "DEF")
            self.operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        elif name == "vllm.triton_utils.dispatcher":
            from llvmlite.binding import ffi

            function = ffi._lib_wrapper.__getattr__

            def attribute(library: Any, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return function(library, name)

            ffi._lib_wrapper.__getattr__ = attribute


sys.meta_path.insert(0, _BeforeImports())  # type: ignore[arg-type]
