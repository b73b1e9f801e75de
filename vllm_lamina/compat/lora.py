"""LoRA with several lanes: they share the adapters, and each has its own mapping of tokens to adapters.

vLLM's LoRA layers read the mapping of the step from one punica wrapper that all of them hold. A lane's step runs on the
lane's own thread, so it is enough that the wrapper is another one in each thread.
"""

from __future__ import annotations

import threading
from typing import Any

from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager


def share_adapters(first: Any, other: Any) -> None:
    """Give a model runner the adapters of another one that has the same model.

    From then on every thread has a mapping of its own.
    """
    manager = first.lora_manager._adapter_manager
    if not isinstance(manager, _MappingPerThread):
        # The layers and the first runner hold this very object already, so its class changes.
        manager.__class__ = _MappingPerThread
        name = manager.mm_mapping.language_model[0] if manager.supports_mm else DEFAULT_LANGUAGE_WRAPPER_KEY
        stock = manager.punica_wrapper_mapping[name]
        wrapper = manager.punica_wrapper_mapping[name] = _wrapper_per_thread(manager, stock)
        # Encoders have others, which are set and read within one turn.
        for module in manager.modules.values():
            if module.punica_wrapper is stock:
                module.set_mapping(wrapper)
    other.lora_manager = first.lora_manager


class _MappingPerThread(LRUCacheLoRAModelManager):
    """vLLM's manager of the adapters of a model, for several threads that take turns."""

    def set_adapter_mapping(self, mapping: Any) -> None:
        # vLLM skips a mapping that equals the last one, which may have been another thread's.
        self._last_mapping = None
        super().set_adapter_mapping(mapping)


def _wrapper_per_thread(manager: Any, stock: Any) -> Any:
    """A punica wrapper like ``stock``; each thread that uses it sees attributes of its own, made on first use."""
    per_thread = type(f"{type(stock).__name__}PerThread", (threading.local, type(stock)), {})
    return per_thread(
        manager.max_num_batched_tokens,
        max_batches=manager.max_num_seqs,
        device=manager.device,
        lora_config=manager.lora_config,
    )
