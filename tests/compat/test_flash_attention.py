"""What the local attention of a GPU relies on in vLLM's FlashAttention."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import vllm
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import fa_utils, flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from vllm_lamina.compat import flash_attention


@pytest.fixture(scope="module")
def interface() -> ModuleType:
    """vLLM's wrapper of all versions; without their native parts its package is not to be imported."""
    path = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_takes_what_it_is_given(interface: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relies on these parameters of ``flash_attn_varlen_func``, on it being found in ``fa_utils`` on GPUs, and on the
    LSE that it returns.
    """
    given = []

    def varlen(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given.append(inspect.signature(interface.flash_attn_varlen_func).bind(*args, **kwargs).arguments)
        return torch.zeros(5, 4, 32), torch.zeros(4, 5)

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", varlen, raising=False)
    q, k, starts = torch.zeros(5, 4, 32), torch.zeros(5, 2, 32), torch.tensor([0, 2, 5])
    out, lse = flash_attention.attend(q, k, k, starts, 3, 0.5, 3)
    assert (out.shape, lse.shape) == ((5, 4, 32), (5, 4))
    slopes = torch.ones(4)
    flash_attention.attend(q, k, k, starts, 3, 0.5, 2, 16, 30.0, slopes)
    plain, other = given
    assert (plain["fa_version"], other["fa_version"]) == (3, 2)
    assert plain["max_seqlen_q"] == plain["max_seqlen_k"] == 3
    names = ("window_size", "softcap", "alibi_slopes")
    assert [plain[name] for name in names] == [[-1, -1], 0.0, None]
    assert [other[name] for name in names] == [[15, 0], 30.0, slopes]
    assert "(sliding_window - 1, 0)" in inspect.getsource(FlashAttentionImpl)
    assert "(-alibi_slope * |i + seqlen_k - seqlen_q - j|)" in str(interface.flash_attn_varlen_func.__doc__)
    assert "softmax_lse [optional, if return_softmax_lse=True]: (nheads, total_q_seqlen)" in str(
        interface.flash_attn_varlen_func.__doc__
    )
    assert "    flash_attn_varlen_func,\n" in inspect.getsource(fa_utils)


@pytest.mark.parametrize(
    ("capability", "layer", "version"),
    [
        ((8, 0), (128,), 2),
        ((9, 0), (64,), 3),
        ((9, 0), (256,), 3),
        ((9, 0), (64, False, True), 3),
        ((9, 0), (64, True), 2),
        ((9, 0), (512,), 4),
        ((9, 0), (512, True), 2),
        ((10, 0), (128,), 4),
        ((10, 0), (128, True), 2),
        ((10, 0), (160,), 2),
        ((10, 0), (256,), 2),
        ((10, 0), (512,), 2),
    ],
)
def test_the_version_is_the_gpus(
    capability: tuple[int, int], layer: tuple[Any, ...], version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relies on ``get_flash_attn_version`` knowing what each version lacks; here all are built."""
    interface = ModuleType("flash_attn_interface")
    interface.is_fa_version_supported = lambda version: True  # type: ignore[attr-defined]
    interface.fa_version_unsupported_reason = None  # type: ignore[attr-defined]
    for name, module in (("", ModuleType("vllm_flash_attn")), (".flash_attn_interface", interface)):
        monkeypatch.setitem(sys.modules, f"vllm.vllm_flash_attn{name}", module)
    platform = fa_utils.current_platform
    monkeypatch.setattr(
        platform, "get_device_capability", lambda: DeviceCapability(*capability), raising=False
    )
    assert flash_attention.version_for(*layer) == version


def test_no_version_without_native_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relies on None where none can be imported."""
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", None)
    assert flash_attention.version_for(64) is None


@pytest.mark.parametrize("head_size", [32, 80, 100, 256, 272, 512, 520])
@pytest.mark.parametrize("newest", [3, 4])
def test_it_takes_what_vllms_own_backend_takes(
    newest: int, head_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relies on ``FlashAttentionBackend`` knowing the dtypes and head sizes that versions have, 4 larger ones."""
    monkeypatch.setattr(flash_attn, "is_fa_version_supported", lambda version: version <= newest)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        theirs = FlashAttentionBackend.supports_dtype(dtype) and FlashAttentionBackend.supports_head_size(
            head_size
        )
        assert flash_attention.takes(newest, dtype, head_size) == theirs
