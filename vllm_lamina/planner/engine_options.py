"""How a simulated engine schedules, and what happens to it."""

from __future__ import annotations

from dataclasses import dataclass

WATERMARK = 0.01
"""Fraction of the KV blocks that admission leaves free, so that running requests can grow."""


@dataclass(frozen=True)
class EngineOptions:
    """How the engine schedules.

    Attributes
    ----------
    prefill
        Whether prompts are computed here (chunked, together with decoding), or, as in the paper's evaluation,
        elsewhere: a request then arrives with the KV of its prompt, and recomputing after preemption is free too.
    max_sequences
        Requests in flight at most; None leaves it to memory.
    token_budget
        Prompt and output tokens of one step at most, when prefill is computed here.
    block_size
        Tokens of a KV block.
    recompute
        Whether requests that lost their KV recompute it here even if prompts are computed elsewhere.
    """

    prefill: bool = False
    max_sequences: int | None = None
    token_budget: int = 8192
    block_size: int = 16
    recompute: bool = False


@dataclass(frozen=True)
class Failure:
    """A worker that fails and is replaced.

    Attributes
    ----------
    time
        When, in seconds.
    downtime
        Seconds until its replacement runs.
    shards
        Shards of the KV cache that are lost, whose requests are admitted again; none if a model worker failed.
    """

    time: float
    downtime: float
    shards: tuple[int, ...] = ()
