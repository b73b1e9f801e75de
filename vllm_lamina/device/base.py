"""What a compute device has to offer so that the model worker can run its half of attention on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class Chunks:
    """The prefill chunks of one step: rows that follow one another, and attend within their chunk alone.

    Attributes
    ----------
    starts
        [chunks + 1], int32: the first row of each chunk, and how many rows there are.
    """

    def __init__(self, lengths: npt.ArrayLike) -> None:
        self.starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        self._on_device: torch.Tensor | None = None

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each chunk, at least 1."""
        return [int(length) for length in np.diff(self.starts)]

    @cached_property
    def longest(self) -> int:
        """Rows of the longest chunk."""
        return max(self.lengths)

    def starts_on(self, device: torch.device) -> torch.Tensor:
        """`starts` on the compute device. They are copied once, for all layers, and nothing waits for the copy."""
        if self._on_device is None:
            host = torch.from_numpy(self.starts)
            if device.type == "cuda":
                host = host.pin_memory()  # from other memory the copy may wait for the stream
            self._on_device = host.to(device, non_blocking=True)
        return self._on_device


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
            [rows, num_kv_heads, head_size], the dtype of q, on the device, each row contiguous.
        chunks
            Which rows belong together.

        Returns
        -------
        tuple
            The output, [rows, num_heads, head_size] in the dtype of q, and its LSE, [rows, num_heads] float32
            (natural logarithm).
        """


class Device(ABC):
    """Moves q, k, v and the output between the device and the exchange, and attends prefill chunks locally."""

    worker_cls: str
    """Qualified name of the model worker's class on this device."""

    backend_name: str
    """The member of vLLM's ``AttentionBackendEnum`` in whose place Lamina's attention backend runs."""

    backend_is_asked_for: bool
    """Whether vLLM takes that member only where the configuration names it."""

    @abstractmethod
    def rows_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory that holds the values of ``tensor``: [tokens, heads, head_size], each token's row contiguous."""

    @abstractmethod
    def host_output(self, output: torch.Tensor) -> torch.Tensor:
        """Host memory for the attention output, of the shape and dtype of ``output``, each token's row contiguous."""

    @abstractmethod
    def put_output(self, host: torch.Tensor, output: torch.Tensor) -> None:
        """Bring what was written to ``host_output(output)`` into ``output``."""

    @abstractmethod
    def local_attention(self, head_size: int, scale: float) -> LocalAttention:
        """What attends the prefill chunks of a layer; asked while the layer is made, under vLLM's configuration.

        Parameters
        ----------
        head_size
            Of q, k and v.
        scale
            Factor of q . k before the softmax.
        """
