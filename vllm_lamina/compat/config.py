"""What Lamina's executor tells vLLM's engine, and its own scheduler, by the configuration that they share.

How many batches the engine keeps in flight: vLLM derives the number and offers no option for it. And how the scheduler
has to place KV blocks, and on which attention workers, which only the executor knows, and vLLM builds both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def tell_recovery(config: VllmConfig, recovery: object) -> None:
    """Let the scheduler that is built from ``config`` know whom to ask when an attention worker is lost."""
    config.lamina_recovery = recovery


def recovery_of(config: VllmConfig) -> Any:
    """What the executor told; None for a scheduler without one."""
    return getattr(config, "lamina_recovery", None)


def tell_block_placement(config: VllmConfig, placement: tuple[str, list[int]] | None) -> None:
    """Let the scheduler that is built from ``config`` know the model worker's ``block_placement``."""
    config.lamina_block_placement = placement


def block_placement(config: VllmConfig) -> tuple[str, list[int]] | None:
    """What the executor told; None where blocks need no placement."""
    placement: tuple[str, list[int]] | None = getattr(config, "lamina_block_placement", None)
    return placement


def tell_attention_workers(config: VllmConfig, addresses_by_rank: Sequence[Sequence[str]]) -> None:
    """Let the scheduler that is built from ``config`` know the attention workers, now and whenever they change."""
    config.lamina_attention_workers = addresses_by_rank


def attention_workers(config: VllmConfig) -> Sequence[Sequence[str]]:
    """Addresses of the attention workers of each rank, as the executor told them last."""
    workers: Sequence[Sequence[str]] = getattr(config, "lamina_attention_workers", ())
    return workers
