"""The model worker's exchange with its attention worker, as the attention layers use it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from vllm_lamina.attention_backend.step import Step, StepPlan
from vllm_lamina.device import Device
from vllm_lamina.errors import LaminaError

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer

    from vllm_lamina._native import AttentionClient


class StepFailed(Exception):
    """Ends a step that cannot be completed because an attention worker was lost."""


@dataclass
class Exchange:
    """The one exchange of a model worker's process.

    vLLM builds attention layers and metadata builders itself and gives them no reference of ours, and one process
    runs one model worker at a time: so they find the exchange through `current`.
    """

    device: Device
    timeout: float
    """Seconds one wait may take."""
    ranks_wait: bool = False
    """Whether other ranks of the model wait in every layer for this one."""
    _client: AttentionClient | None = None
    _failures: dict[int, str] = field(default_factory=dict)
    """By lane: why its step cannot be completed."""
    _layer_indices: dict[str, int] = field(default_factory=dict)
    _block_size: int = 0
    _steps: dict[int, StepPlan | Step] = field(default_factory=dict)
    """By lane: the step that its runner runs, from the first layer on in the order of the runner's batch."""

    _current: ClassVar[Exchange | None] = None

    def activate(self) -> Self:
        """Make this the exchange of the process."""
        Exchange._current = self
        return self

    def deactivate(self) -> None:
        """Forget the exchange of the process, if it is this one."""
        if Exchange._current is self:
            Exchange._current = None

    @staticmethod
    def current() -> Exchange:
        """The exchange of the process. Raises LaminaError where no model worker of Lamina runs."""
        if Exchange._current is None:
            raise LaminaError("Lamina's attention backend is used outside of a Lamina model worker.")
        return Exchange._current

    def open(self, client: AttentionClient, layer_names: Sequence[str], block_size: int) -> None:
        """Attend through ``client``: its layer i is ``layer_names[i]``, its blocks hold ``block_size`` tokens."""
        self._client = client
        self._block_size = block_size
        self._layer_indices = {name: index for index, name in enumerate(layer_names)}

    @property
    def client(self) -> AttentionClient:
        """The native client of the data channel."""
        if self._client is None:
            raise LaminaError("The attention worker's KV pool is not configured yet.")
        return self._client

    @contextlib.contextmanager
    def running(self, lane: int, plan: StepPlan) -> Iterator[None]:
        """Let the lane's layers attend the planned step; without a step they attend nothing."""
        self._steps[lane] = plan
        try:
            yield
        finally:
            del self._steps[lane]

    def step(self, lane: int) -> Step | None:
        """The step that the lane's runner has prepared, the same one each time; None where there is none."""
        step = self._steps.get(lane)
        if isinstance(step, StepPlan):
            step = self._steps[lane] = Step(step, self._block_size)
        return step

    def fail_step(self, lane: int, error: Exception) -> None:
        """An attention worker was lost: the lane's step ends here.

        Raises
        ------
        StepFailed
            But not where other ranks of the model wait for this one: there the step runs to its end without the
            workers, for nothing.
        Exception
            ``error``, where no worker is lost.
        """
        if lane not in self._failures:
            if not self.client.failed_workers:
                raise error
            self._failures[lane] = str(error)
            self.client.fail_step(lane, str(error))
        if not self.ranks_wait:
            raise StepFailed(str(error)) from error

    def take_failure(self, lane: int) -> str | None:
        """Why the lane's last step cannot be completed, if it cannot; it is asked once a step."""
        return self._failures.pop(lane, None)

    def layer_index(self, layer: AttentionLayer) -> int:
        """The attention worker's index of a layer of the model."""
        return self._layer_indices[layer.layer_name]
