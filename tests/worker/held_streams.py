"""Streams whose operations the test executes, one by one, and the kernels of the exchange in plain PyTorch."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

import torch
from cpu_stream import load, store

from vllm_lamina.device.frame_descriptor import FrameDescriptor, Heads


class HeldStream:
    """See `Stream`. What is enqueued is done by `advance` alone."""

    def __init__(self) -> None:
        self._operations: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()

    def advance(self) -> bool:
        """Do the next operation, unless it waits or there is none: whether it was done."""
        if not self._operations or not self._operations[0][0]():
            return False
        self._operations.popleft()[1]()
        return True

    @property
    def is_done(self) -> bool:
        return not self._operations

    def _enqueue(self, run: Callable[[], None], may_run: Callable[[], bool] = lambda: True) -> None:
        self._operations.append((may_run, run))

    def enter(self) -> None:
        pass

    def run(self, launch: Callable[[], None]) -> None:
        self._enqueue(launch)

    def write(self, word: int, value: int) -> None:
        self._enqueue(lambda: store(word, value))

    def wait(self, word: int, value: int) -> None:
        self._enqueue(lambda: None, lambda: load(word) >= value)

    def mark(self) -> Event:
        mark = Event()
        self._enqueue(mark.set)
        return mark

    def wait_for(self, mark: Event) -> None:
        self._enqueue(lambda: None, mark.is_set)

    def fence(self) -> None:
        """Who enqueues looks at `is_done` instead."""

    def synchronize(self) -> None:
        while not self.is_done:
            assert self.advance(), "a stream waits for ever"


class HeldStreams:
    """See `Streams`. They reach nothing but what was registered."""

    def __init__(self, stream: Callable[[], HeldStream] = HeldStream) -> None:
        self.streams: list[HeldStream] = []
        self._stream = stream
        self._memories: list[tuple[int, int]] = []

    def stream(self, lane: int) -> Any:
        self.streams.append(self._stream())
        return self.streams[-1]

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(*shape, dtype=dtype), torch.zeros(*shape, dtype=dtype)

    def register(self, memories: Sequence[tuple[int, int]]) -> None:
        self._memories = list(memories)

    def pack(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        q_tokens: torch.Tensor,
        kv_tokens: torch.Tensor,
        descriptor: torch.Tensor,
        heads: Heads,
    ) -> None:
        step = FrameDescriptor(*descriptor.tolist())
        q, kv = q_tokens[: step.num_q].long(), kv_tokens[: step.num_kv].long()
        for rows, tokens, first, count, offset in (
            (query, q, heads.first_q, heads.num_q, 0),
            (key, kv, heads.first_kv, heads.num_kv, step.k_offset),
            (value, kv, heads.first_kv, heads.num_kv, step.v_offset),
        ):
            if rows is not None and len(tokens):
                part = rows[tokens, first : first + count]
                self._at(step.payload + offset, part.shape).copy_(part)

    def take(
        self,
        output: torch.Tensor,
        index: torch.Tensor,
        head_ranges: torch.Tensor,
        descriptors: torch.Tensor,
        replies: torch.Tensor,
        local: torch.Tensor | None = None,
        local_lse: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        size = output.shape[2]
        wants_sink = torch.zeros(output.shape[:2], dtype=torch.bool)
        parts, lses = [torch.zeros_like(output)], [torch.full(output.shape[:2], -torch.inf)]
        if local is not None and local_lse is not None:
            is_local = local != 0
            parts[0][is_local], lses[0][is_local] = output[is_local], local_lse[is_local]
        for rows, (first, count), fields, address in zip(
            index, head_ranges.tolist(), descriptors.tolist(), replies.tolist(), strict=True
        ):
            step, heads = FrameDescriptor(*fields), slice(first, first + count)
            tokens = ((rows >= 0) & (rows < step.num_q)).nonzero()[:, 0]
            if address == 0 or not len(tokens):
                continue
            chosen, alone = rows[tokens].long(), step.num_rows_without_lse
            lse = torch.zeros(step.num_q, count)
            if alone < step.num_q:
                lse[alone:] = self._at(address + step.lse_offset, (step.num_q - alone, count))
            parts.append(torch.zeros_like(output))
            lses.append(torch.full(output.shape[:2], -torch.inf))
            parts[-1][tokens, heads] = self._at(address, (step.num_q, count, size))[chosen]
            lses[-1][tokens, heads] = lse[chosen]
            wants_sink[tokens[chosen >= alone], heads] = True
        if sinks is not None:
            if local is not None:
                wants_sink[local != 0] = False
            parts.append(torch.zeros_like(output))
            lses.append(torch.where(wants_sink, sinks, -torch.inf))
        weights = torch.softmax(torch.stack(lses), 0).nan_to_num(0.0)[..., None]
        output.copy_((weights * torch.stack(parts)).sum(0))

    def _at(self, address: int, shape: Sequence[int]) -> torch.Tensor:
        """float32 there."""
        count = torch.Size(shape).numel()
        assert any(
            begin <= address and address + 4 * count <= begin + num_bytes
            for begin, num_bytes in self._memories
        ), "a stream reaches what was not registered, or was given back"
        memory = (ctypes.c_float * count).from_address(address)
        return torch.frombuffer(memory, dtype=torch.float32).view(*shape)
