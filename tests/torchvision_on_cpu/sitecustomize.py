"""Lets torchvision, whose wheels are built for CUDA, be imported beside the CPU build of torch.

Python imports this at its start where the folder is on PYTHONPATH. torchvision describes two operators of its native
library, which does not load: they are declared before. Image processors use neither.
"""

from __future__ import annotations

import sys
from typing import Any


class _DeclaresOperators:
    """Declares them as soon as torchvision is imported, and finds no module itself."""

    library: Any = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != "torchvision" or self.library is not None:
            return
        import torch

        self.library = torch.library.Library("torchvision", "DEF")
        self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclaresOperators())  # type: ignore[arg-type]
