"""Ending a request with an error from inside the scheduler; vLLM does so for grammars that do not compile."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.core.sched.scheduler import Scheduler


def end_with_errors(scheduler: Scheduler, request_ids: Iterable[str]) -> None:
    """Let the scheduler's next ``update_from_output`` end these requests, and tell their clients."""
    scheduler.grammar_compile_error_reqs.update(request_ids)
