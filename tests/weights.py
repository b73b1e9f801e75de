"""A writer of weights, as a trainer that shares an engine's model brings it: its worker extension and its function."""

from __future__ import annotations

import time
from typing import Any

import torch

SCALED = "layernorm.weight"
"""How the names of the weights that are written end. Linear layers on CPUs compute with packed copies of theirs."""

SECONDS = 0.02
"""Between one write and the next, and how long a slow step waits before its last normalisation."""


def scale_slowly(model: Any, factor: float) -> None:
    """Multiply the weights before each layer's attention and MLP by `factor`, one after the other from the last on."""
    weights = [weight for name, weight in model.named_parameters() if name.endswith(SCALED)]
    with torch.no_grad():
        for weight in reversed(weights):
            weight.mul_(factor)
            time.sleep(SECONDS)


class Writer:
    """vLLM's ``worker_extension_cls``: methods that become the model worker's."""

    def write_weights(self, factor: float) -> None:
        scale_slowly(self.get_model(), factor)

    def slow_down_steps(self) -> None:
        """Let a step that is in flight stay there, short of its last layer's MLP."""
        last = self.get_model().model.layers[-1].post_attention_layernorm
        last.register_forward_pre_hook(lambda module, inputs: time.sleep(SECONDS))
