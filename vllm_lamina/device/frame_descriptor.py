"""What the host tells the kernels of the exchange: where a worker's frame is, what it holds, and to wait no more."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch

POISON = 2**31 - 1
"""Written by the host to a word that a stream waits for, it lets every wait pass: no layer has so high a number."""

ALIGNMENT = 64
"""Bytes: addresses of payloads, and the parts of one, are multiples of it (csrc/wire/frames.h)."""


class Heads(NamedTuple):
    """The query and KV heads that an attention worker holds: the first, and how many."""

    first_q: int
    num_q: int
    first_kv: int
    num_kv: int


class FrameDescriptor(NamedTuple):
    """One attention worker's part of a step: a row of int64, in this order, that the kernels read.

    Attributes
    ----------
    payload
        Address on the device of the frame's payload, a multiple of 64.
    num_q, num_kv
        Rows of q, and rows of k and of v, in the frame. The reply has ``num_q`` rows.
    k_offset, v_offset
        Bytes from the begin of the payload; q begins it.
    num_rows_without_lse
        The reply's first rows, which are all that there is of their heads.
    lse_offset
        Bytes from the begin of the reply's payload; the output begins it.
    """

    payload: int
    num_q: int
    num_kv: int
    k_offset: int
    v_offset: int
    num_rows_without_lse: int
    lse_offset: int

    @classmethod
    def of(
        cls,
        payload: int,
        num_q: int,
        num_kv: int,
        num_rows_without_lse: int,
        heads: Heads,
        head_sizes: tuple[int, int],
        dtype: torch.dtype,
    ) -> Self:
        """With the offsets of ``AttendLayout`` and ``OutputLayout``. ``head_sizes`` are those of k and of v."""
        k_size, v_size = (size * dtype.itemsize for size in head_sizes)
        k = _aligned(num_q * heads.num_q * k_size)
        v = k + _aligned(num_kv * heads.num_kv * k_size)
        lse = _aligned(num_q * heads.num_q * v_size)
        return cls(payload, num_q, num_kv, k, v, num_rows_without_lse, lse)

    def write(self, row: torch.Tensor) -> None:
        """Write it to ``row``: [fields], int64, in memory that the kernels read."""
        row.copy_(torch.tensor(self, dtype=torch.int64))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
