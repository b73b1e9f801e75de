"""The local attention of a GPU, with the operators that only a GPU has played by the CPU's, behind their signatures."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from test_local_attention import qkv

from vllm_lamina.compat import flash_attention
from vllm_lamina.device import efficient_attention
from vllm_lamina.device.base import Chunks
from vllm_lamina.device.cpu import causal_attention
from vllm_lamina.device.cuda import CudaDevice

SCALE = 0.2


class Operators:
    """Plays both operators, and keeps which was called, with FlashAttention's version."""

    def __init__(self) -> None:
        self.calls: list[int | str] = []

    def flash(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> Any:
        """`flash_attn_varlen_func`, as to what it is given and returns: LSE [num_heads, rows]."""
        self.calls.append(given["fa_version"])
        assert given["causal"]
        assert given["return_softmax_lse"]
        assert given["cu_seqlens_q"] is given["cu_seqlens_k"]
        assert given["max_seqlen_q"] == given["max_seqlen_k"]
        chunks = chunks_of(given["cu_seqlens_q"], given["max_seqlen_q"])
        out, lse = causal_attention(q, k, v, chunks, given["softmax_scale"])
        return out, lse.transpose(0, 1)

    def efficient(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: None,
        starts_q: torch.Tensor,
        starts_k: torch.Tensor,
        longest_q: int,
        longest_k: int,
        dropout: float,
        mask: int,
        *,
        compute_log_sumexp: bool,
        scale: float,
    ) -> Any:
        """`_efficient_attention_forward`: a batch of 1, no grouped heads, LSE [chunks, num_heads, padded to 32]."""
        self.calls.append("efficient")
        # PyTorch's own rules for the shapes, and the operator's schema.
        meta = [t.to("meta") for t in (q, k, v, starts_q, starts_k)]
        promised = torch.ops.aten._efficient_attention_forward(
            *meta[:3],
            bias,
            *meta[3:],
            longest_q,
            longest_k,
            dropout,
            mask,
            compute_log_sumexp=compute_log_sumexp,
            scale=scale,
        )
        assert q.shape[0] == k.shape[0] == v.shape[0] == 1
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert all(t.stride(-1) == 1 and t.stride(-2) % 8 == t.stride(-3) % 8 == 0 for t in (q, k, v))
        assert (dropout, mask, longest_q) == (0.0, 1, longest_k)
        chunks = chunks_of(starts_q, longest_q)
        out, lse = causal_attention(q[0], k[0], v[0], chunks, scale)
        padded = torch.full(promised[1].shape, math.inf)
        for row, part in zip(padded, lse.split(chunks.lengths), strict=True):
            row[:, : part.shape[0]] = part.transpose(0, 1)
        assert promised[0].shape == out.unsqueeze(0).shape
        return out.unsqueeze(0), padded, *promised[2:]


def chunks_of(starts: torch.Tensor, longest: int) -> Chunks:
    """What an operator makes of the chunks that it is told of."""
    assert starts.dtype == torch.int32
    chunks = Chunks(starts.diff().numpy())
    assert chunks.longest == longest
    return chunks


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Operators:
    """In the places of the GPU's; vLLM takes FlashAttention 3."""
    playing = Operators()
    fa_utils = types.ModuleType("fa_utils")
    fa_utils.flash_attn_varlen_func = playing.flash  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", fa_utils)
    monkeypatch.setattr(flash_attention, "version_for", lambda head_size: 3)
    monkeypatch.setattr(efficient_attention, "_operator", playing.efficient)
    return playing


@pytest.mark.parametrize("lengths", [[1], [70], [5, 33, 1, 32]], ids=str)
@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_for_all_chunks(
    operators: Operators, dtype: torch.dtype, num_kv_heads: int, lengths: list[int]
) -> None:
    q, k, v = qkv(sum(lengths), 6, num_kv_heads, 48, dtype)
    chunks = Chunks(lengths)
    out, lse = CudaDevice().local_attention(48, SCALE)(q, k, v, chunks)
    assert operators.calls == [3 if dtype == torch.bfloat16 else "efficient"]
    expected_out, expected_lse = causal_attention(q, k, v, chunks, SCALE)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


def test_a_gpu_without_flash_attention(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "version_for", lambda head_size: None)
    q, k, v = qkv(9, 2, 2, 64, torch.float16)
    CudaDevice().local_attention(64, SCALE)(q, k, v, Chunks([9]))
    assert operators.calls == ["efficient"]


@pytest.mark.parametrize(
    ("dtype", "head_size", "taken"),
    [
        (torch.float16, 64, True),
        (torch.bfloat16, 80, True),
        (torch.bfloat16, 256, True),
        (torch.bfloat16, 272, False),
        (torch.bfloat16, 100, False),
        (torch.float32, 64, False),
    ],
    ids=str,
)
def test_what_flash_attention_takes(dtype: torch.dtype, head_size: int, taken: bool) -> None:
    assert flash_attention.takes(dtype, head_size) == taken


def test_chunks_are_told_to_the_device_once() -> None:
    chunks = Chunks([3, 4])
    assert chunks.starts_on(torch.device("cpu")) is chunks.starts_on(torch.device("cpu"))
    assert chunks.starts_on(torch.device("cpu")).tolist() == [0, 3, 7]
