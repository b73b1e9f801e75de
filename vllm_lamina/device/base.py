"""What a compute device has to offer so that the model worker can run its half of attention on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch


class Chunks:
    """The prefill chunks of one step: rows that follow one another, and attend within their chunk alone.

    Attributes
    ----------
    starts
        [chunks + 1], int32: the first row of each chunk, and how many rows there are.
    positions
        [chunks], int32: the position of each chunk's first token in its request.
    """

    def __init__(self, lengths: npt.ArrayLike, positions: npt.ArrayLike) -> None:
        self.starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        self.positions = np.asarray(positions, np.int32)
        self._on_device: torch.Tensor | None = None
        self._cuts: dict[int, Chunks] = {}

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each chunk, at least 1."""
        return [int(length) for length in np.diff(self.starts)]

    @cached_property
    def longest(self) -> int:
        """Rows of the longest chunk."""
        return max(self.lengths)

    def cut(self, size: int) -> Chunks:
        """The same rows, where tokens attend within ``size`` positions from a multiple of it: one chunk for each.

        They are cut once, for all layers.
        """
        if size not in self._cuts:
            lengths, positions = [], []
            for length, position in zip(self.lengths, self.positions.tolist(), strict=True):
                edges = range(position // size * size + size, position + length, size)
                bounds = [position, *edges, position + length]
                positions += bounds[:-1]
                lengths += np.diff(bounds).tolist()
            self._cuts[size] = Chunks(lengths, positions)
        return self._cuts[size]

    def starts_on(self, device: torch.device) -> torch.Tensor:
        """`starts` on the compute device. They are copied once, for all layers, and nothing waits for the copy."""
        if self._on_device is None:
            host = torch.from_numpy(self.starts)
            if device.type == "cuda":
                host = host.pin_memory()  # from other memory the copy may wait for the stream
            self._on_device = host.to(device, non_blocking=True)
        return self._on_device


@dataclass(frozen=True, eq=False)
class LayerShape:
    """What a layer does with q, k and v.

    Attributes
    ----------
    head_size
        Of q and k.
    head_size_v
        Of v and the output.
    scale
        Factor of q . k.
    dtype
        Of q, k, v and the output.
    window
        A token attends itself and ``window - 1`` tokens before it; 0: all before it.
    chunk
        A token at position p attends positions ``p // chunk * chunk`` to p; 0: all before it.
    soft_cap
        Scores are ``soft_cap * tanh(scale * q . k / soft_cap)``; 0: as they are.
    sinks
        [num_heads]: logits that are added to the denominator of the softmax alone. A parameter of the model, which is
        loaded after the layer is made.
    alibi_slopes
        [num_heads], float32: times the position of the key less that of the query, added to the scores after all else.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    scale: float
    dtype: torch.dtype
    window: int = 0
    chunk: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None


class LocalAttention(Protocol):
    """Causal attention of a layer among the tokens of each chunk."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Parameters
        ----------
        q
            [rows, num_heads, head_size], on the device, each row contiguous.
        k, v
            [rows, num_kv_heads, head_size or head_size_v], the dtype of q, on the device, each row contiguous.
        chunks
            Which rows belong together.

        Returns
        -------
        tuple
            The output, [rows, num_heads, head_size_v] in the dtype of q, and its LSE, [rows, num_heads] float32
            (natural logarithm). Sinks are counted in both.
        """


class Stream(Protocol):
    """Work of one lane on the device, done in the order in which it is enqueued. Who enqueues does not wait.

    A *word* is the address of an int32 in memory that was registered: see `Streams.register`.
    """

    def enter(self) -> None:
        """What the calling thread does with tensors goes to this stream from now on."""

    def run(self, launch: Callable[[], None]) -> None:
        """Enqueue what ``launch`` launches."""

    def write(self, word: int, value: int) -> None:
        """Enqueue: set a word, once all that came before can be seen by the host."""

    def wait(self, word: int, value: int) -> None:
        """Enqueue: wait until a word is at least ``value``."""

    def mark(self) -> Any:
        """All that was enqueued so far, for `wait_for` of another stream."""

    def wait_for(self, mark: Any) -> None:
        """Enqueue: wait until what is marked on another stream is done."""

    def fence(self) -> None:
        """What the caller does next with tensors comes after what was enqueued."""

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""


class Streams(Protocol):
    """A device that works on its own, beside the host."""

    def pack(self, *args: Any) -> None:
        """Launch `exchange_kernels.pack`."""

    def take(self, *args: Any) -> None:
        """Launch `exchange_kernels.take`."""

    def register(self, memories: Sequence[tuple[int, int]]) -> None:
        """Let the device reach memory of the host: (address, bytes) each. What was registered before is forgotten."""

    def stream(self, lane: int) -> Stream:
        """The lane's stream."""

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros on the device, and memory of the host from which they can be filled without waiting."""


class Device(ABC):
    """What the model worker does otherwise from device to device."""

    device_type: str
    """vLLM's name of it."""

    worker_cls: str
    """Qualified name of the model worker's class on this device."""

    backend_name: str
    """The member of vLLM's ``AttentionBackendEnum`` in whose place Lamina's attention backend runs."""

    backend_is_asked_for: bool
    """Whether vLLM takes that member only where the configuration names it."""

    def streams(self) -> Streams | None:
        """How layers are exchanged without the host; None where the host does all work, in its own memory."""
        return None

    @abstractmethod
    def local_attention(self, shape: LayerShape) -> LocalAttention:
        """What attends the prefill chunks of a layer; asked while the layer is made, under vLLM's configuration.

        Raises
        ------
        UnsupportedError
            The device cannot do it; names what, and what to change.
        """
