"""What `scripts/gpu.sh` measures, as far as it runs without a GPU: on streams that threads of the CPU execute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cores import ATTENTION_CPU
from cpu_graph import CpuGraph, capture
from cpu_stream import CpuStreams, LaneStream, launch_one_at_a_time
from kernel_modules import exchange_kernels

from benchmarks.gpu import DecodeSteps, compare, page, round_trip_us, run_parts


class RunAhead(LaneStream):
    """A host that only enqueues waits for nothing."""

    def fence(self) -> None:
        pass


class Streams(CpuStreams):
    def stream(self, lane: int) -> Any:
        return RunAhead(lane)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CpuGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("num_lanes", "captured"), [(1, False), (2, False), (2, True)])
def test_exchange(num_lanes: int, captured: bool) -> None:
    launch_one_at_a_time()
    streams = Streams(exchange_kernels(interpreted=True))
    steps = DecodeSteps(streams, (4, 2, 32), 2, 2, num_lanes, captured)
    took, attention = steps.run(3, context=40, cpus=[int(ATTENTION_CPU)])
    assert 0 < attention < took


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("captured", [False, True])
def test_words(captured: bool) -> None:
    memory = np.zeros(256, np.uint8)
    stream = RunAhead(0)
    stream.enter()
    assert round_trip_us(stream, memory.ctypes.data, memory.ctypes.data + 128, captured, times=5) > 0
    stream.close()


def test_equality_counts_up_to_the_first_difference() -> None:
    expected = [[[1, 2, 3], [-0.5, -0.25, -1.0]], [[7, 8], [-1.0, -2.0]]]
    same = [[[1, 2, 3], [-0.5, -0.25, -1.0]], [[7, 8], [-1.0, -2.5]]]
    assert compare(expected, same) == {"equal": "2 of 2", "log-probabilities apart": 0.5}
    other = [[[1, 5, 3], [-0.5, -9.0, -9.0]], [[7, 8], [-1.0, -2.0]]]
    assert compare(expected, other) == {"equal": "1 of 2", "log-probabilities apart": 0.0}


def test_a_part_that_breaks_costs_itself() -> None:
    rows: list[tuple[str, dict[str, Any]]] = []
    run_parts(["words"], lambda part, row: rows.append((part, row)))
    assert rows[-1] == ("words", {"error": "status 1"}), "there is no GPU here"
    assert "| status 1 |" in page({"GPU": "none"}, rows)
