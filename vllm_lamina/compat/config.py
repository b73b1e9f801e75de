"""How many batches vLLM's engine keeps in flight: vLLM derives the number and offers no option for it."""

from __future__ import annotations

from vllm.config import VllmConfig


class _TwoBatchesConfig(VllmConfig):
    """vLLM's configuration, with two batches in flight."""

    @property
    def max_concurrent_batches(self) -> int:
        return 2


def with_batches_in_flight(config: VllmConfig, num_batches: int) -> VllmConfig:
    """Let the engine that is built from ``config`` keep ``num_batches`` (1 or 2) in flight; returns ``config``."""
    if num_batches == 2:
        # The engine holds this very object already, so its class changes, and nothing else of it.
        config.__class__ = _TwoBatchesConfig
    return config
