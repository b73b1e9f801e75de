"""What the kernels of the exchange are given: q, k, v of a model, and replies with the tables that describe them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_lamina.device.frame_descriptor import FrameDescriptor, Heads

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NO_TOKENS = float("-inf")
OUTSIDE = 10**6
"""An index that no buffer reaches."""


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def padded(values: list[int], count: int) -> torch.Tensor:
    return int32(*values, *[OUTSIDE] * (count - len(values)))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


@dataclass
class Model:
    """Query and KV heads, sizes of k and v."""

    num_heads: int
    num_kv_heads: int
    k_size: int
    v_size: int

    def heads_of(self, kv_heads: list[int]) -> list[Heads]:
        """What workers have that hold so many KV heads each."""
        group, first, found = self.num_heads // self.num_kv_heads, 0, []
        for count in kv_heads:
            found.append(Heads(first * group, count * group, first, count))
            first += count
        return found

    def qkv(self, num_tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Slices of the rows of a fused projection, somewhat longer than they."""
        shapes = [
            (self.num_heads, self.k_size),
            (self.num_kv_heads, self.k_size),
            (self.num_kv_heads, self.v_size),
        ]
        widths = [heads * size for heads, size in shapes]
        rows = torch.randn(num_tokens, sum(widths) + 16).to(dtype)
        return [
            part.unflatten(1, shape)
            for part, shape in zip(rows.split([*widths, 16], 1), shapes, strict=False)
        ]


@dataclass
class Replies:
    """What workers answer, and the tables that say so. Rows are added, then `write` lays them out."""

    dtype: torch.dtype
    num_tokens: int
    num_heads: int
    size: int
    head_ranges: list[tuple[int, int]]

    def __post_init__(self) -> None:
        # By worker: tokens, [heads of the worker, size] each, that have no other contribution; and with their LSE.
        self.alone: list[list[tuple[int, torch.Tensor]]] = [[] for _ in self.head_ranges]
        self.merged: list[list[tuple[int, torch.Tensor, torch.Tensor]]] = [[] for _ in self.head_ranges]
        self.memory: list[torch.Tensor] = []
        self.index = torch.full((len(self.head_ranges), self.num_tokens), -1, dtype=torch.int32)
        self.descriptors = torch.zeros(len(self.head_ranges), len(FrameDescriptor._fields), dtype=torch.int64)
        # Each word in a cache line of its own.
        self.addresses = torch.zeros(len(self.head_ranges), 8, dtype=torch.int64)[:, 0]

    def part(self, worker: int) -> torch.Tensor:
        return torch.randn(self.head_ranges[worker][1], self.size).to(self.dtype)

    def write(self) -> None:
        for worker, (first, count) in enumerate(self.head_ranges):
            alone, merged = self.alone[worker], self.merged[worker]
            rows = [row[1] for row in (*alone, *merged)]
            heads = Heads(first, count, 0, 1)
            step = FrameDescriptor.of(0, len(rows), 0, len(alone), heads, (8, self.size), self.dtype)
            step.write(self.descriptors[worker])
            for row, part in enumerate((*alone, *merged)):
                self.index[worker, part[0]] = row
            memory = torch.full((step.lse_offset + 4 * count * len(merged) + 256,), 0xFF, dtype=torch.uint8)
            begin = -memory.data_ptr() % 64
            if rows:
                out = raw(torch.stack(rows))
                memory[begin:][: len(out)] = out
            if merged:
                lse = raw(torch.stack([part[2] for part in merged]))
                memory[begin + step.lse_offset :][: len(lse)] = lse
            self.memory.append(memory)
            self.addresses[worker] = memory.data_ptr() + begin

    def expected(
        self,
        out: torch.Tensor,
        local: torch.Tensor,
        local_lse: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[tokens, heads, size], float32."""
        shape = (2 + 2 * len(self.head_ranges), self.num_tokens, self.num_heads)
        parts, lses = torch.zeros(*shape, self.size), torch.full(shape, NO_TOKENS)
        is_local = local != 0
        parts[0, is_local], lses[0, is_local] = out[is_local].float(), local_lse[is_local]
        for worker, (first, count) in enumerate(self.head_ranges):
            heads = slice(first, first + count)
            for token, part in self.alone[worker]:
                parts[1 + worker, token, heads], lses[1 + worker, token, heads] = part.float(), 0.0
            for token, part, lse in self.merged[worker]:
                parts[1 + worker, token, heads], lses[1 + worker, token, heads] = part.float(), lse
                if sinks is not None and not local[token]:
                    lses[-1, token, heads] = sinks[heads]  # of an output that is 0
        weights = torch.softmax(lses, 0).nan_to_num(0.0)
        return (weights[..., None] * torch.where(weights[..., None] > 0, parts, 0.0)).sum(0)
