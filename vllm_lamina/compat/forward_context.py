"""vLLM's forward context is one variable of the process; lanes that take turns each have their own."""

from __future__ import annotations

from typing import Any

from vllm import forward_context


def take_aside() -> Any:
    """Leave the process without a forward context, and return what it was; before a turn is handed over."""
    context = forward_context._forward_context
    forward_context._forward_context = None
    return context


def put_back(context: Any) -> None:
    """Make ``context`` the process's again; when the turn has come back."""
    forward_context._forward_context = context
