"""vLLM's scratch memory for kernels: one of the process, which steps on two streams must not share."""

from __future__ import annotations

from vllm.v1.worker import workspace

from vllm_lamina.errors import UnsupportedError


def add_workspace() -> None:
    """Have scratch memory for one lane more; it is taken when it is needed.

    Raises
    ------
    UnsupportedError
        vLLM divides batches in micro-batches (``--enable-dbo``), which have scratch memory each.
    """
    if not workspace.is_workspace_manager_initialized():
        return
    manager = workspace.current_workspace_manager()
    if manager._num_ubatches > 1:
        raise UnsupportedError(
            "Lamina does not support micro-batches (--enable-dbo) with two batches in flight: use --lamina-batches 1."
        )
    manager._num_lanes += 1
    manager._current_workspaces.append(None)
    manager._persistent_resources.append({})


def use_workspace(lane: int) -> None:
    """Let what the calling thread launches from now on use the lane's."""
    workspace._workspace_lane.set(lane)


def let_workspaces_grow() -> None:
    """After vLLM's warm-up, which takes and locks what the first lane needs: what others need is not known before."""
    if workspace.is_workspace_manager_initialized():
        workspace.unlock_workspace()
