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


def grow_workspaces() -> None:
    """After vLLM's warm-up, which takes and locks what the first lane needs: let the others have as much.

    Not later: graphs hold the address of a workspace, and one that grows moves. Resources that never move are made
    when a lane first asks for them, so the lock is open from now on.
    """
    if workspace.is_workspace_manager_initialized():
        workspace.unlock_workspace()
        manager = workspace.current_workspace_manager()
        num_bytes = manager._workspace_size_bytes(manager._current_workspaces[0])
        for lane in range(1, manager._num_lanes):
            with workspace.use_workspace_lane(lane):
                manager._ensure_workspace_size(num_bytes)
