"""Models that name an attention backend themselves, whatever vLLM selects: each is served, or refused by name.

Relies on the members of ``AttentionBackendEnum`` that MiMo-V2 takes one of, and on what it asks of their classes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_lamina.attention_backend import LaminaAttentionBackend
from vllm_lamina.compat.backends import (
    NAMED_BY_MODELS,
    override_attention_backend,
    restore_attention_backend,
)

SERVED = "model_executor/models/mimo_v2.py"

REFUSED = {
    "model_executor/models/openpangu.py",  # a rule that one model alone has
    "model_executor/models/whisper_causal.py",  # its layers: other attention options
    # MLA, and sparse attention with it.
    "models/deepseek_v32/amd/rocm.py",
    "models/deepseek_v32/attention.py",
    "models/dots3_note/nvidia/model.py",
    "models/hy_v4/nvidia/attention.py",
    # Its layers: other attention options.
    "models/step5/nvidia/model.py",
}


@pytest.fixture
def overridden() -> Iterator[None]:
    for name in NAMED_BY_MODELS:
        override_attention_backend(name, "vllm_lamina.attention_backend.LaminaAttentionBackend")
    yield
    for name in NAMED_BY_MODELS:
        restore_attention_backend(name)


def test_they_are_known() -> None:
    """Fails when a release of vLLM has another one: is it served, or refused by name?"""
    root = Path(vllm.__file__).parent
    files = [file for folder in ("models", "model_executor/models") for file in (root / folder).rglob("*.py")]
    naming = {
        str(file.relative_to(root)) for file in files if re.search(r"\battn_backend=\w", file.read_text())
    }
    assert SERVED in naming
    assert not naming - REFUSED - {SERVED}


@pytest.mark.parametrize("name", NAMED_BY_MODELS)
def test_what_they_name_is_lamina(overridden: None, name: str) -> None:
    assert AttentionBackendEnum[name].get_class() is LaminaAttentionBackend
    source = (Path(vllm.__file__).parent / SERVED).read_text()
    assert f"AttentionBackendEnum.{name}" in source


def test_what_they_ask_is_answered() -> None:
    module = Path(vllm.__file__).parent / "v1/attention/backends/flash_attn_diffkv.py"
    for method in ("set_head_size_v", "is_supported_on_current_device"):
        parameters = [*inspect.signature(getattr(LaminaAttentionBackend, method)).parameters]
        [asked] = re.findall(rf"def {method}\(\s*cls,(.*?)\) ->", module.read_text(), re.DOTALL)
        assert parameters == re.findall(r"(\w+):", asked)
    assert LaminaAttentionBackend.is_supported_on_current_device(192, 128, has_sinks=True)
