"""What `benchmarks.gpu` measures, how much of it and on which device: all that a run without a GPU has otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_lamina.device.base import Streams

Row = dict[str, Any]
"""What a part reports at a time."""


@dataclass(frozen=True)
class Model:
    """A Llama; ``heads`` are query heads, KV heads and head size."""

    hidden_size: int
    intermediate_size: int
    heads: tuple[int, int, int]
    layers: int


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    round_trips: int = 300
    widths: tuple[int, int, int] = (32, 8, 128)
    """Query heads, KV heads and head size of Llama-3-8B."""
    layers: int = 32
    exchanged_steps: int = 20
    batches: tuple[int, ...] = (8, 64, 256)
    context: int = 1024
    decoded: int = 32
    small: Model = Model(1024, 2816, (16, 4, 64), 8)
    big: Model = Model(4096, 14336, (32, 8, 128), 16)
    prompts: tuple[int, ...] = (1, 5, 17, 33, 64, 100, 129, 300, 511, 700, 1500, 3000)
    compared: int = 24
    memory: str = "16GiB"
    engine: dict[str, Any] = field(default_factory=lambda: {"max_model_len": 4096, "max_num_seqs": 256})
    stock: dict[str, Any] = field(default_factory=dict)
    """Options of stock vLLM alone."""


# Replaced by tests/device/gpu_on_cpu.py.
SIZES = Sizes()
PROGRAM = [sys.executable, "-m", "benchmarks.gpu"]


def make_streams() -> Streams:
    """The device's."""
    from vllm_lamina.device.cuda_streams import CudaStreams

    return CudaStreams()


def word_streams(memory: tuple[int, int]) -> Iterator[tuple[str, Any]]:
    """Streams that write words and wait for them, by the driver's operations and by kernels: None where there are none.

    ``memory`` is where the words are.
    """
    from vllm_lamina.device.cuda_streams import CudaStream, CudaStreams

    streams = CudaStreams()
    streams.register([memory])
    failed = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    for name, driver in (("kernels", None), ("driver", streams._driver)):
        is_missing = name == "driver" and driver is None
        yield name, None if is_missing else CudaStream(driver, failed, torch.cuda.current_device())
