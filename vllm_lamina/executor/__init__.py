"""vLLM executors whose engine keeps its KV cache on attention workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_lamina.executor.executors import LaminaExecutor


def __getattr__(name: str) -> object:
    """``LaminaExecutor``: the executor for the process mode that vLLM is in.

    The name is what users give as ``--distributed-executor-backend``; which class it is depends on
    ``VLLM_ENABLE_V1_MULTIPROCESSING``, as it does for vLLM's own executors.
    """
    if name != "LaminaExecutor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vllm.envs as envs

    from vllm_lamina.executor import executors

    return (
        executors.LaminaExecutor if envs.VLLM_ENABLE_V1_MULTIPROCESSING else executors.LaminaUniProcExecutor
    )


__all__ = ["LaminaExecutor"]
