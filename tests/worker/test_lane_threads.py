"""The threads of a model worker's lanes."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
from vllm.v1.worker import workspace

from vllm_lamina.worker.model_worker.lanes import Lane, Lanes


class Runner:
    """Says on which thread it captures."""

    shared_places = None

    def __init__(self) -> None:
        self.captured_on = ""

    def use_graphs(self) -> None:
        pass

    def capture(self) -> None:
        self.captured_on = threading.current_thread().name


class Exchange:
    """Its layers cannot be entered by ``broken``; where there is none, they can."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.layers = self

    def enter(self, lane: int) -> None:
        if lane == self.broken:
            raise RuntimeError("this lane has no stream")


def test_a_lane_that_cannot_begin_says_why() -> None:
    with pytest.raises(RuntimeError, match="this lane has no stream"):
        Lane(7, cast(Any, Runner()), cast(Any, Exchange(broken=7)), cast(Any, None), has_thread=True)
    assert all(thread.name != "lamina-lane-7" for thread in threading.enumerate())


def test_each_lane_captures_on_its_thread() -> None:
    """There is what vLLM keeps for a thread: the mapping of adapters, the workspace, the current stream."""
    assert not workspace.is_workspace_manager_initialized()
    runners = [Runner(), Runner(), Runner()]
    lanes = Lanes(cast(Any, runners), cast(Any, Exchange()), cast(Any, None), [0], answers=True)
    try:
        assert lanes.warm_up(lambda: threading.current_thread().name) == "lamina-lane-0"
    finally:
        lanes.stop()
    assert [runner.captured_on for runner in runners] == ["", "lamina-lane-1", "lamina-lane-2"]
