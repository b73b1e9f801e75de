"""What vLLM says of a layer is what the model worker's half of it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import qkv, reference

from vllm_lamina.attention_backend import Exchange
from vllm_lamina.attention_backend.impl import LaminaAttentionImpl
from vllm_lamina.device import device_for
from vllm_lamina.device.base import Chunks
from vllm_lamina.errors import UnsupportedError


@pytest.fixture
def on_cpu() -> Iterator[None]:
    exchange = Exchange(device_for("cpu"), timeout=1.0).activate()
    yield
    exchange.deactivate()


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, {"window": 0, "chunk": 0, "soft_cap": 0.0, "sinks": None, "alibi_slopes": None}),
        ({"num_kv_heads": None}, {"num_kv_heads": 4}),
        ({"sliding_window": 32}, {"window": 32}),
        ({"sliding_window": -1}, {"window": 0}),
        ({"sliding_window": 0}, {"window": 0}),
        ({"logits_soft_cap": 30.0}, {"soft_cap": 30.0}),
        ({"kv_sharing_target_layer_name": "a"}, {}),
        ({"other": None}, {}),
        ({"chunk_lookback": -1}, {}),
    ],
    ids=str,
)
def test_shape(on_cpu: None, arguments: dict[str, Any], shape: dict[str, Any]) -> None:
    layer = LaminaAttentionImpl(4, 32, 0.5, **{"num_kv_heads": 2} | arguments)
    plain = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 32,
        "head_size_v": 32,
        "scale": 0.5,
        "dtype": torch.float32,
    }
    for name, value in (plain | shape).items():
        assert getattr(layer.shape, name) == value, name


def test_all_at_once(on_cpu: None) -> None:
    sinks = torch.tensor([1.0, -1.0, 0.5, 2.0])
    layer = LaminaAttentionImpl(
        4, 32, 0.2, 2, alibi_slopes=[0.5, 0.25, 0.1, 0.01], sliding_window=9, logits_soft_cap=2.0, sinks=sinks
    )
    layer.complete(head_size_v=48, chunk=16)
    assert (layer.shape.head_size_v, layer.shape.chunk, layer.shape.window) == (48, 16, 9)
    q, k, v = qkv(40, 4, 2, 32, torch.float32, 48)
    out, lse = layer.attend_locally(q, k, v, Chunks([40], [21]))
    expected_out, expected_lse = reference(q, k, v, layer.shape, position=21)
    torch.testing.assert_close(out.double(), expected_out, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_what_is_not_known_is_refused(on_cpu: None) -> None:
    with pytest.raises(UnsupportedError, match=r"other attention options .*other=\('chunk_lookback',\)"):
        LaminaAttentionImpl(4, 32, 0.5, chunk_lookback=1)


def test_a_layer_that_attends_what_it_has_stored_is_refused(on_cpu: None) -> None:
    query = torch.zeros(3, 4, 32)
    call: tuple[Any, ...] = (None, query, None, None, torch.empty(0), None, torch.empty_like(query))
    LaminaAttentionImpl(4, 32, 0.5, kv_sharing_target_layer_name="a").forward(*call)
    with pytest.raises(UnsupportedError, match=r"other attention options .*key=None"):
        LaminaAttentionImpl(4, 32, 0.5).forward(*call)
