"""The model worker's exchange with its attention worker, as the attention layers use it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from vllm_lamina.attention_backend.step import Step, StepPlan
from vllm_lamina.device import Device
from vllm_lamina.errors import LaminaError

if TYPE_CHECKING:
    import torch
    from vllm.v1.attention.backend import AttentionLayer

    from vllm_lamina._native import Channel
    from vllm_lamina.device.base import LocalAttention
    from vllm_lamina.kv_cache.geometry import Geometry


class Layers(Protocol):
    """How the layers of a step are exchanged.

    Decodes are answered by the attention workers, prefill chunks by both sides, merged by LSE.
    """

    def enter(self, lane: int) -> None:
        """Called once on the lane's thread, where it has one."""

    def announce(self, lane: int) -> None:
        """The lane's next step comes after all that were announced before."""

    def begin(self, lane: int) -> None:
        """The lane's step begins: it finds what all steps that are over left in what lanes share."""

    def prepare(self, lane: int, step: Step | None) -> None:
        """Called before the layers of every step, also where a graph replays them; None attends nothing."""

    def attend(
        self,
        lane: int,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
        attend_locally: LocalAttention,
    ) -> None:
        """Attend one layer of the lane's step, all layers in order.

        Parameters
        ----------
        layer
            The attention workers' index of the layer.
        query
            [step.num_tokens, num_heads, head_size].
        key, value
            [step.num_tokens, num_kv_heads, head_size] and head_size_v, the dtype of ``query``; None for a layer that
            attends what another stores.
        output
            [step.num_tokens, num_heads, head_size_v], written in place; anything if the step fails.
        attend_locally
            The layer's attention within prefill chunks.
        """

    def attend_latent(
        self,
        lane: int,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        output: torch.Tensor,
        attend_chunks: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        project: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """The same for a layer with a latent cache.

        Parameters
        ----------
        query
            [step.num_tokens, num_heads, head_size], absorbed; read in `Step.rows_of_workers` alone.
        key
            [step.num_tokens, 1, head_size], of which the front are the values.
        output
            [step.num_tokens, num_heads, the model's size of a value], written in place.
        attend_chunks
            The layer's attention within all prefill chunks: output and LSE, as of a `LocalAttention`.
        project
            What becomes of the attention workers' output, [rows, num_heads, head_size_v], before it is merged.
        """

    def capture(
        self,
        lane: int,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attend one layer of whichever step of decodes is prepared when it runs: it may be captured in a graph.

        Tensors are as of `attend`, with at least as many tokens; further rows of ``output`` become zeros.
        """

    def wait(self, lane: int) -> None:
        """Wait for the end of the step's exchange, after its layers; without the turn."""

    def take_failure(self, lane: int) -> str | None:
        """Why the lane's step cannot be completed, if an attention worker was lost; once a step, after `wait`."""

    def end(self, lane: int) -> None:
        """All of the lane's step is enqueued, its sampling too."""

    def synchronize(self, lane: int) -> None:
        """Wait until a device has done what was enqueued for the lane."""

    def replace_channel(self, worker: int, channel: Channel) -> None:
        """Give a lost worker's part to whoever serves ``channel``. No lane may be in a step."""


@dataclass
class Exchange:
    """The one exchange of a model worker's process.

    vLLM builds attention layers and metadata builders itself and gives them no reference of ours, and one process
    runs one model worker at a time: so they find the exchange through `current`.
    """

    device: Device
    timeout: float
    """Seconds one wait may take."""
    _layers: Layers | None = None
    _layer_indices: dict[str, int] = field(default_factory=dict)
    _geometry: Geometry | None = None
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

    def open(self, layers: Layers, layer_names: Sequence[str], geometry: Geometry) -> None:
        """Attend by ``layers``: its layer i is ``layer_names[i]``, and ``geometry.layers[i]``."""
        self._layers = layers
        self._geometry = geometry
        self._layer_indices = {name: index for index, name in enumerate(layer_names)}

    @property
    def layers(self) -> Layers:
        """How layers are exchanged."""
        if self._layers is None:
            raise LaminaError("The attention worker's KV pool is not configured yet.")
        return self._layers

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
            assert self._geometry is not None
            step = self._steps[lane] = Step(step, self._geometry)
        return step

    def layer_index(self, layer: AttentionLayer) -> int:
        """The attention worker's index of a layer of the model."""
        return self._layer_indices[layer.layer_name]
