"""vLLM's graphs of the pieces between attention: the compiled model, which lanes share, has a place for one set."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from vllm.compilation.cuda_graph import CUDAGraphWrapper


class PiecewiseGraphs:
    """One lane's. They hold addresses of the lane's buffers, and of memory of ``pool``.

    Graphs of another lane may run meanwhile, so they have a pool of their own. None where nothing is captured.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._entries: WeakKeyDictionary[CUDAGraphWrapper, dict[Any, Any]] = WeakKeyDictionary()

    def use(self) -> None:
        """Capture these and replay these, until another lane's are used."""
        for piece in CUDAGraphWrapper._all_instances:
            piece.concrete_cudagraph_entries = self._entries.setdefault(piece, {})
            if self._pool is not None:
                piece.graph_pool = self._pool
