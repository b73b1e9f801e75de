"""The interfaces of vLLM's LoRA that two lanes rely on."""

from __future__ import annotations

import inspect
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_lamina.compat.lora import share_adapters
from vllm_lamina.errors import UnsupportedError
from vllm_lamina.worker.model_worker.worker import LaminaCPUWorker


def manager_of(modules: dict[str, BaseLayerWithLoRA]) -> Any:
    """vLLM's manager as far as mappings go, for a model of these layers, with adapter 7 in slot 1."""
    manager = object.__new__(LRUCacheLoRAModelManager)
    manager.max_num_batched_tokens, manager.max_num_seqs = 16, 4
    manager.device, manager.lora_config = torch.device("cpu"), SimpleNamespace(max_loras=2)
    manager.vocab_size = 100
    manager.supports_mm = False
    manager.lora_index_to_id = [None, 7]
    manager._last_mapping = manager._last_slot_layout = manager._classification_head = None
    wrapper = PunicaWrapperCPU(16, max_batches=4, device=manager.device)
    manager.punica_wrapper_mapping = {DEFAULT_LANGUAGE_WRAPPER_KEY: wrapper}
    manager.modules = modules
    for module in modules.values():
        module.set_mapping(wrapper)
    return manager


def in_another_thread(task: Any) -> Any:
    result = []
    thread = threading.Thread(target=lambda: result.append(task()))
    thread.start()
    thread.join(10.0)
    return result[0]


def test_each_thread_has_its_own_mapping() -> None:
    """Relies on ``_adapter_manager``, ``set_adapter_mapping``, ``_last_mapping`` and ``set_mapping`` of the layers, and
    on a punica wrapper keeping the mapping in its attributes.
    """
    layer = BaseLayerWithLoRA()
    manager = manager_of({"layer": layer})
    first, other = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager)), SimpleNamespace()
    share_adapters(first, other)
    assert other.lora_manager is first.lora_manager

    def slots(mapping: LoRAMapping) -> list[int]:
        manager.set_adapter_mapping(mapping)
        return list(layer.punica_wrapper.token_lora_indices)

    mine = LoRAMapping((7, 0, 7), (7, 0, 7), is_prefill=True)
    assert slots(mine) == [1, -1, 1]
    assert in_another_thread(lambda: slots(LoRAMapping((0, 7), (0, 7), is_prefill=True))) == [-1, 1]
    assert list(layer.punica_wrapper.token_lora_indices) == [1, -1, 1]
    # A thread whose mapping equals the one that another thread set last.
    assert in_another_thread(lambda: slots(mine)) == [1, -1, 1]


def test_the_scheduler_asks_before_it_admits() -> None:
    """Relies on this hook, asked for each waiting request, and on it being where adapters may be counted too."""
    from vllm.v1.core.sched.scheduler import Scheduler

    assert [*inspect.signature(Scheduler._handle_blocked_waiting_request).parameters] == ["self", "request"]
    assert "_handle_blocked_waiting_request(request)" in inspect.getsource(Scheduler.schedule)


def test_adapters_are_pinned_by_this_method() -> None:
    """Relies on its name and its parameter."""
    from vllm.v1.worker.gpu_worker import Worker

    assert [*inspect.signature(Worker.pin_lora).parameters] == ["self", "lora_id"]


def test_no_adapter_is_pinned_with_two_lanes() -> None:
    worker = object.__new__(LaminaCPUWorker)
    worker._lanes = [object(), object()]
    with pytest.raises(UnsupportedError, match="use --lamina-batches 1"):
        worker.pin_lora(1)


def test_an_adapter_may_be_loaded_in_place() -> None:
    """Relies on ``load_inplace`` of ``LoRARequest``, a msgspec structure, and on a new request's being replaceable."""
    import dataclasses

    import msgspec
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import NewRequestData

    request = LoRARequest("name", 1, "path", load_inplace=True)
    assert not msgspec.structs.replace(request, load_inplace=False).load_inplace
    assert "lora_request" in {field.name for field in dataclasses.fields(NewRequestData)}
