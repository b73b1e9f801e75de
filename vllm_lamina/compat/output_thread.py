"""Making vLLM's worker process answer steps when they are done, not in the order in which they are asked for.

``WorkerProc`` has a thread that waits for outputs while its main loop takes the next step, but starts it only if
``scheduler_config.async_scheduling`` is set when the model has been loaded.
"""

from __future__ import annotations

from vllm.config import VllmConfig


def request_output_thread(config: VllmConfig) -> None:
    """Ask for the thread; to be called at the end of ``load_model``."""
    config.scheduler_config.async_scheduling = True


def output_thread_started(config: VllmConfig) -> None:
    """Undo the request, which nobody else may see; to be called at the first opportunity afterwards."""
    config.scheduler_config.async_scheduling = False
