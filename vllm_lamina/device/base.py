"""What a compute device has to offer so that the model worker can run its half of attention on it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Device(ABC):
    """Moves q, k, v and the output between the device and the exchange, and attends a prefill chunk locally."""

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
    def causal_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention among the tokens of one prefill chunk.

        Parameters
        ----------
        q
            [tokens, num_heads, head_size], on the device.
        k, v
            [tokens, num_kv_heads, head_size], the dtype of q, on the device.
        scale
            Factor of q . k before the softmax.

        Returns
        -------
        tuple
            The output, [tokens, num_heads, head_size] in the dtype of q, and its LSE, [tokens, num_heads] float32
            (natural logarithm).
        """
