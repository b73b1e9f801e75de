"""vLLM's graphs of pieces of the model, of which each lane has its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cpu_graph import CpuGraph, capture
from vllm.compilation import cuda_graph
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

from vllm_lamina.compat.piecewise_graphs import PiecewiseGraphs


class Graph(CpuGraph):
    """On no stream."""

    def replay(self) -> None:
        for operation in self.operations:
            operation()


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The memory pools of the graphs that were captured."""
    used: list[Any] = []

    def capture_in(graph: CpuGraph, pool: Any, stream: Any) -> Any:
        used.append(pool)
        return capture(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture_in)
    monkeypatch.setattr(type(current_platform), "_global_graph_pool", "vLLM's", raising=False)
    monkeypatch.setattr(cuda_graph, "weak_ref_tensors", lambda tensors: tensors)
    monkeypatch.setattr(cuda_graph, "is_forward_context_available", lambda: True)
    step = SimpleNamespace(batch_descriptor="8 tokens", cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE)
    monkeypatch.setattr(cuda_graph, "get_forward_context", lambda: step)
    return used


def test_a_lane_replays_its_own(pools: list[Any]) -> None:
    """Relies on a piece taking its graphs from ``concrete_cudagraph_entries``, and their memory from ``graph_pool``."""
    config: Any = SimpleNamespace(compilation_config=None, use_cumem_cudagraph_pool=False)
    pieces = [
        cuda_graph.CUDAGraphWrapper(lambda rows, by=by: rows * by, config, CUDAGraphMode.PIECEWISE)
        for by in (2, 3)
    ]
    lanes = [PiecewiseGraphs(None), PiecewiseGraphs("the second lane's")]
    buffers = [torch.zeros(8), torch.zeros(8)]
    for lane, rows in zip(lanes, buffers, strict=True):
        lane.use()
        for piece in pieces:
            piece(rows)
    assert pools == ["vLLM's"] * 2 + ["the second lane's"] * 2
    for number, which in enumerate([0, 1, 1, 0], start=1):
        buffers[which].fill_(number)
        lanes[which].use()
        assert [piece(buffers[which]).tolist() for piece in pieces] == [
            [2.0 * number] * 8,
            [3.0 * number] * 8,
        ]
    assert len(pools) == 4, "nothing is captured twice"
