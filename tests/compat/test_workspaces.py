"""vLLM's scratch memory for kernels, of which each lane on a stream has its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from vllm.v1.worker import workspace

from vllm_lamina.compat.workspaces import add_workspace, grow_workspaces, use_workspace
from vllm_lamina.errors import UnsupportedError


@pytest.fixture
def manager() -> Iterator[workspace.WorkspaceManager]:
    workspace.init_workspace_manager(torch.device("cpu"))
    yield workspace.current_workspace_manager()
    workspace.reset_workspace_manager()


def scratch(lane: int, num_bytes: int) -> int:
    """Where it lies, for a thread of the lane's."""
    found: list[int] = []

    def run() -> None:
        use_workspace(lane)
        manager = workspace.current_workspace_manager()
        found.append(manager.get_persistent("scratch", (num_bytes,), torch.uint8).data_ptr())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_each_lane_has_its_own(manager: workspace.WorkspaceManager) -> None:
    add_workspace()
    first, second = scratch(0, 1 << 16), scratch(1, 1 << 16)
    assert abs(first - second) >= 1 << 16
    assert (first, second) == (scratch(0, 1 << 16), scratch(1, 1 << 16))


def test_it_grows_after_the_warm_up(
    manager: workspace.WorkspaceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    add_workspace()
    first = scratch(0, 1 << 16)
    manager.get_simultaneous(((1 << 12,), torch.uint8))
    workspace.lock_workspace()
    grow_workspaces()
    sizes = [workspace_of_lane.numel() for workspace_of_lane in manager._current_workspaces]
    assert sizes == [1 << 12] * 2, "none has to grow where the first did not: it would move"
    scratch(1, 1 << 16)
    assert scratch(0, 1 << 16) == first, "captured graphs hold its address"


def test_without_a_manager_there_is_nothing_to_divide() -> None:
    assert not workspace.is_workspace_manager_initialized()
    add_workspace()
    grow_workspaces()


def test_micro_batches_are_refused() -> None:
    workspace.init_workspace_manager(torch.device("cpu"), num_ubatches=2)
    try:
        with pytest.raises(UnsupportedError, match=r"--enable-dbo.*: use --lamina-batches 1"):
            add_workspace()
    finally:
        workspace.reset_workspace_manager()
