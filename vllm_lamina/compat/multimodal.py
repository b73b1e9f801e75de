"""Multimodal models with several lanes: all have what the encoder computed, and each the inputs of its own step."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.interfaces import supports_multimodal

OF_ALL_LANES = ("_parameters", "_modules")


def model_of_lane(model: Any) -> Any:
    """A model for one more lane: it has the same weights and layers, and attributes of its own.

    vLLM's multimodal models keep some of a step's inputs as attributes, from embedding on until the layers read them:
    features for the first layers, embeddings for each layer, a mask of the visual tokens. Another lane may embed its
    step in between.
    """
    if not supports_multimodal(model):
        return model
    lane = object.__new__(type(model))
    lane.__dict__ = {
        name: value if name in OF_ALL_LANES else _own(value) for name, value in vars(model).items()
    }
    return lane


def _own(value: Any) -> Any:
    """The value, but for tensors, which another lane may write: copies of them."""
    match value:
        case torch.nn.Parameter():
            return value
        case torch.Tensor():
            return value.clone()
        case list():
            return [_own(item) for item in value]
        case dict() if type(value) is dict:
            return {key: _own(item) for key, item in value.items()}
    return value
