"""The local attention of a GPU, with the operators that only a GPU has played by the CPU's, behind their signatures."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import SINKS, SLOPES, plain, qkv

from vllm_lamina.compat import flash_attention
from vllm_lamina.device import efficient_attention
from vllm_lamina.device.base import Chunks
from vllm_lamina.device.cpu import CpuDevice
from vllm_lamina.device.cuda import CudaDevice
from vllm_lamina.errors import UnsupportedError

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
        before, after = given["window_size"]  # tokens before and after a query that it sees; -1: all
        assert (before, after) == (-1, -1) or (before >= 0 and after == 0)
        assert given["alibi_slopes"] is None or given["fa_version"] == 2
        assert q.shape[2] <= 256 or given["fa_version"] == 4
        rule = {
            "window": before + 1,
            "soft_cap": given["softcap"],
            "alibi_slopes": given["alibi_slopes"],
        }
        out, lse = attend(q, k, v, chunks, given["softmax_scale"], **rule)
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
        window_size: int | None,
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
            window_size=window_size,
        )
        assert q.shape[0] == k.shape[0] == v.shape[0] == 1
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert all(t.stride(-1) == 1 and t.stride(-2) % 8 == t.stride(-3) % 8 == 0 for t in (q, k, v))
        assert (dropout, mask, longest_q) == (0.0, 1, longest_k)
        chunks = chunks_of(starts_q, longest_q)
        out, lse = attend(q[0], k[0], v[0], chunks, scale, window=window_size or 0)
        padded = torch.full(promised[1].shape, math.inf)
        for row, part in zip(padded, lse.split(chunks.lengths), strict=True):
            row[:, : part.shape[0]] = part.transpose(0, 1)
        assert promised[0].shape == out.unsqueeze(0).shape
        return out.unsqueeze(0), padded, *promised[2:]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks, scale: float, **rule: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operators of a GPU do, done on the CPU."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    shape = plain(q.shape[1], k.shape[1], q.shape[2], q.dtype, scale=scale, **rule)
    return CpuDevice().local_attention(shape)(q, k, v, chunks)


def chunks_of(starts: torch.Tensor, longest: int) -> Chunks:
    """What an operator makes of the chunks that it is told of."""
    assert starts.dtype == torch.int32
    lengths = starts.diff().numpy()
    chunks = Chunks(lengths, np.zeros_like(lengths))
    assert chunks.longest == longest
    return chunks


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Operators:
    """In the places of the GPU's; vLLM takes FlashAttention 3, 2 with ALiBi, or 4 for large heads."""
    playing = Operators()
    fa_utils = types.ModuleType("fa_utils")
    fa_utils.flash_attn_varlen_func = playing.flash  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", fa_utils)
    monkeypatch.setattr(
        flash_attention, "version_for", lambda size, alibi, soft_cap: 2 if alibi else 4 if size > 256 else 3
    )
    monkeypatch.setattr(efficient_attention, "_operator", playing.efficient)
    return playing


@pytest.mark.parametrize("lengths", [[1], [70], [5, 33, 1, 32]], ids=str)
@pytest.mark.parametrize("num_kv_heads", [6, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_for_all_chunks(
    operators: Operators, dtype: torch.dtype, num_kv_heads: int, lengths: list[int]
) -> None:
    q, k, v = qkv(sum(lengths), 6, num_kv_heads, 48, dtype)
    chunks = Chunks(lengths, [0] * len(lengths))
    shape = plain(6, num_kv_heads, 48, dtype, scale=SCALE)
    out, lse = CudaDevice().local_attention(shape)(q, k, v, chunks)
    assert operators.calls == [3 if dtype == torch.bfloat16 else "efficient"]
    expected_out, expected_lse = CpuDevice().local_attention(shape)(q, k, v, chunks)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize(
    ("dtype", "rule", "called"),
    [
        (torch.bfloat16, {"window": 20, "sinks": SINKS}, 3),
        (torch.bfloat16, {"window": 20, "soft_cap": 2.0}, 3),
        (torch.bfloat16, {"chunk": 32, "alibi_slopes": SLOPES}, 2),
        (torch.float32, {"window": 20, "chunk": 32, "sinks": SINKS}, "efficient"),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_size_v", [64, 48, 96])
def test_all_that_a_layer_may_do_with_scores(
    operators: Operators, head_size_v: int, dtype: torch.dtype, rule: dict[str, Any], called: int | str
) -> None:
    lengths, positions = [5, 90, 1], [30, 0, 7]
    q, k, v = qkv(sum(lengths), 6, 2, 64, dtype, head_size_v)
    shape = plain(6, 2, 64, dtype, head_size_v=head_size_v, scale=SCALE, **rule)
    chunks = Chunks(lengths, positions)
    out, lse = CudaDevice().local_attention(shape)(q, k, v, chunks)
    assert operators.calls == [called]
    expected_out, expected_lse = CpuDevice().local_attention(shape)(q, k, v, chunks)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize(
    ("dtype", "head_size", "rule", "named"),
    [
        (torch.float32, 64, {"soft_cap": 2.0}, "soft-capping of a layer with head size 64 in float32"),
        (torch.float32, 64, {"alibi_slopes": SLOPES}, "ALiBi of a layer with head size 64 in float32"),
        (torch.bfloat16, 512, {"alibi_slopes": SLOPES}, "ALiBi of a layer with head size 512 in bfloat16"),
    ],
    ids=str,
)
def test_what_no_operator_does_is_refused_when_the_layer_is_made(
    operators: Operators, dtype: torch.dtype, head_size: int, rule: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"{named} .*: use --dtype bfloat16 with head sizes up to 256"):
        CudaDevice().local_attention(plain(6, 2, head_size, dtype, **rule))


def test_a_gpu_without_flash_attention(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "version_for", lambda *layer: None)
    q, k, v = qkv(9, 2, 2, 64, torch.float16)
    CudaDevice().local_attention(plain(2, 2, 64, torch.float16))(q, k, v, Chunks([9], [0]))
    assert operators.calls == ["efficient"]


@pytest.mark.parametrize(
    ("version", "dtype", "head_size", "taken"),
    [
        (3, torch.float16, 64, True),
        (3, torch.bfloat16, 80, True),
        (2, torch.bfloat16, 256, True),
        (2, torch.bfloat16, 272, False),
        (4, torch.bfloat16, 512, True),
        (3, torch.bfloat16, 100, False),
        (4, torch.float32, 64, False),
    ],
    ids=str,
)
def test_what_flash_attention_takes(version: int, dtype: torch.dtype, head_size: int, taken: bool) -> None:
    assert flash_attention.takes(version, dtype, head_size) == taken


def test_chunks_are_told_to_the_device_once() -> None:
    chunks = Chunks([3, 4], [0, 0])
    assert chunks.starts_on(torch.device("cpu")) is chunks.starts_on(torch.device("cpu"))
    assert chunks.starts_on(torch.device("cpu")).tolist() == [0, 3, 7]
