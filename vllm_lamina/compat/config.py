"""What Lamina's executor tells vLLM's engine, its own scheduler and the front ends, by the configuration they share.

How many batches the engine keeps in flight: vLLM derives the number and offers no option for it. And facts that only
the executor knows, while it is vLLM that builds the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_lamina.errors import ConfigError


class _SettledConfig(VllmConfig):
    """vLLM's configuration, whose settings stay: an engine core in a process of its own computes them once more.

    On CPUs that would take chunked prefill from models with latent attention while the scheduler goes on with chunks'
    budget: prompts beyond it would wait for ever.
    """

    def __post_init__(self) -> None:
        sections = self.cache_config, self.scheduler_config
        names = ("block_size", "enable_prefix_caching"), ("enable_chunked_prefill", "max_num_batched_tokens")
        kept = [
            (section, name, getattr(section, name))
            for section, own in zip(sections, names, strict=True)
            for name in own
        ]
        super().__post_init__()
        for section, name, value in kept:
            setattr(section, name, value)


class _TwoBatchesConfig(_SettledConfig):
    """The same with two batches in flight."""

    @property
    def max_concurrent_batches(self) -> int:
        return 2


def with_batches_in_flight(config: VllmConfig, num_batches: int) -> VllmConfig:
    """Let the engine that is built from ``config`` keep ``num_batches`` (1 or 2) in flight; returns ``config``."""
    # The engine holds this very object already, so its class changes, and nothing else of it.
    config.__class__ = _TwoBatchesConfig if num_batches == 2 else _SettledConfig
    return config


def lanes_share_requests(config: VllmConfig) -> bool:
    """Whether a request may run in any lane: the model runner keeps the requests' states in one place."""
    shared: bool = config.use_v2_model_runner
    return shared


def settle_block_size(config: VllmConfig, num_tokens: int) -> bool:
    """Let KV blocks hold so many tokens, unless the user says how many; True where vLLM's default is another number.

    But for vLLM 0.32 on CPUs, the default is replaced by a model worker once it has loaded the model. The attention
    workers need the number before.
    """
    cache = config.cache_config
    if cache.user_specified_block_size:
        return False
    differs: bool = cache.block_size != num_tokens
    cache.block_size = num_tokens
    cache.user_specified_block_size = True
    return differs


def settle_attention_backend(config: VllmConfig, name: str) -> bool:
    """Let vLLM take this member of its enumeration of backends; True where it would not have."""
    attention, backend = config.attention_config, AttentionBackendEnum[name]
    differs: bool = attention.backend is not backend
    attention.backend = backend
    return differs


def settle_batches(config: VllmConfig) -> bool:
    """With tensor parallelism, let one batch be in flight, unless the user says how many; True where it were two."""
    options: dict[str, object] = config.additional_config.setdefault("lamina", {})
    if config.parallel_config.tensor_parallel_size == 1 or "batches" in options:
        return False
    options["batches"] = 1
    return True


def settle_whole_inputs(config: VllmConfig) -> bool:
    """Where a model's multimodal inputs see their own tokens whole, let no step cut one; True where vLLM would."""
    scheduler = config.scheduler_config
    if not config.model_config.is_mm_prefix_lm or scheduler.disable_chunked_mm_input:
        return False
    scheduler.disable_chunked_mm_input = True
    return True


def settle_scheduler(config: VllmConfig, name: str) -> bool:
    """Let the engine schedule with this class; True where it would not have.

    Raises
    ------
    ConfigError
        It was given another one.
    """
    scheduler = config.scheduler_config
    differs: bool = scheduler.scheduler_cls != name
    if differs and scheduler.scheduler_cls is not None:
        raise ConfigError(
            f"--executor lamina has its own scheduler; remove --scheduler-cls {scheduler.scheduler_cls}"
        )
    scheduler.scheduler_cls = name
    return differs


@dataclass
class EngineFacts:
    """What is known of one engine beside vLLM's configuration of it.

    Attributes
    ----------
    logs_stats
        The front ends take Lamina's statistics out of vLLM's: they must, for vLLM's loggers to take the rest.
    checks_requests
        The front ends refuse requests that would end the engine.
    recovery
        Whom the scheduler asks when an attention worker is lost (`executor.recovery`); None without an executor.
    finish_steps
        Waits until the steps in flight are over, whatever came of them, whose outputs are still to be taken; None
        without an executor.
    block_placement
        The partition and the number of KV blocks of each attention worker; None where all hold a part of every block.
    state_blocks
        Blocks of states that each model worker holds; 0 where the model has no states.
    attention_workers
        Addresses of each rank's attention workers, now: they change.
    """

    logs_stats: bool = False
    checks_requests: bool = False
    recovery: Any = None
    finish_steps: Any = None
    block_placement: tuple[str, list[int]] | None = None
    state_blocks: int = 0
    attention_workers: Sequence[Sequence[str]] = ()


def facts_of(config: VllmConfig) -> EngineFacts:
    """The facts that travel with ``config``, to be read and set; it is pickled for other processes with them.

    In a part of it: vLLM makes further configurations of its fields, for the language model of a multimodal one, and
    takes no attribute that is none of them.
    """
    part: Any = config.scheduler_config
    if not hasattr(part, "lamina"):
        part.lamina = EngineFacts()
    facts: EngineFacts = part.lamina
    return facts
