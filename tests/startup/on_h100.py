"""`configure.py` as on a machine with an H100, on one without: vLLM is told of a platform that nothing else has.

    on_h100.py CASES RESULTS

What it says for stock vLLM 0.32 is what one configured on an H200. An engine that is configured also selects the
attention backend of a layer, as its model worker does.
"""

from __future__ import annotations

import sys
import types
from typing import Any
from unittest.mock import MagicMock

# Native libraries for CUDA, imported with the platform and with the encoders of multimodal models; nothing calls them.
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("_C_stable_libtorch")
sys.modules["vllm.vllm_flash_attn"] = MagicMock()

import torch  # noqa: E402
import vllm.platforms  # noqa: E402
from vllm.platforms.cuda import NonNvmlCudaPlatform  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


class H100(NonNvmlCudaPlatform):
    """One H100."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 << 30

    @classmethod
    def device_count(cls) -> int:
        return 1

    @classmethod
    def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
        return False


vllm.platforms._current_platform = H100()
# Encoders' layers ask when they are imported; any answer will do.
torch.ops._C.cutlass_scaled_mm_supports_block_fp8 = lambda capability: False

from vllm.plugins import load_general_plugins  # noqa: E402

# A platform that is set asks no platform plugin.
load_general_plugins()

import configure  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.model_executor.models.registry import _LazyRegisteredModel  # noqa: E402
from vllm.v1.attention.selector import get_attn_backend  # noqa: E402

from vllm_lamina.attention_backend import LaminaAttentionBackend  # noqa: E402
from vllm_lamina.attention_backend.exchange import Exchange  # noqa: E402
from vllm_lamina.compat.backends import override_attention_backend, restore_attention_backend  # noqa: E402
from vllm_lamina.device import device_for  # noqa: E402

# Keeping what was found out about a model's class imports kernels.
_LazyRegisteredModel._save_modelinfo_to_cache = lambda *arguments: None

chosen_in = configure.chosen_in


def chosen_by_worker(config: Any) -> dict[str, Any]:
    """What vLLM and Lamina chose, with the class that the layers' attention gets in a model worker of Lamina's, and
    what that one captures.
    """
    chosen = chosen_in(config)
    if chosen["attention backend"] != "CUSTOM":
        return chosen
    device = device_for(chosen["device"])
    exchange = Exchange(device, timeout=1.0).activate()
    override_attention_backend(
        device.backend_name, f"{LaminaAttentionBackend.__module__}.LaminaAttentionBackend"
    )
    with set_current_vllm_config(config):
        told = {"has_sink": True, "has_sliding_window": True}
        backend = get_attn_backend(128, torch.bfloat16, config.cache_config.cache_dtype, **told)
    # As the model runner does, by what the backend can have in a graph.
    support = backend.get_builder_cls().get_cudagraph_support(config, None)
    graphs = config.compilation_config.resolve_cudagraph_mode_and_sizes(
        support, backend.__name__, use_v2_model_runner=True
    )
    restore_attention_backend(device.backend_name)
    exchange.deactivate()
    return chosen | {"class": backend.__name__, "graphs": graphs.name}


if __name__ == "__main__":
    configure.chosen_in = chosen_by_worker
    configure.main(*sys.argv[1:])
