"""A part of `benchmarks.gpu` without a GPU, tiny: threads of the CPU execute streams, vLLM has its V2 runner.

`test_gpu_benchmark.py` starts it in place of the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import cpu_stream
import torch
from cpu_graph import CpuGraph, capture
from cpu_stream import CpuStreams, LaneStream
from kernel_modules import exchange_kernels

from benchmarks import gpu, gpu_setup

gpu_setup.PROGRAM = [sys.executable, __file__]
gpu_setup.SIZES = gpu_setup.Sizes(
    round_trips=5,
    widths=(4, 2, 32),
    layers=2,
    exchanged_steps=3,
    batches=(2,),
    context=8,
    decoded=2,
    small=gpu_setup.Model(64, 64, (4, 2, 32), 2),
    big=gpu_setup.Model(64, 64, (4, 2, 32), 2),
    prompts=(1, 33, 40),
    compared=3,
    memory="64MiB",
    stock={"kv_cache_memory_bytes": 64 << 20},
    engine={"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 32},
)


class RunAhead(LaneStream):
    """A host that only enqueues waits for nothing."""

    def fence(self) -> None:
        pass


class Streams(CpuStreams):
    """Of lanes that compute nothing but attention."""

    def stream(self, lane: int) -> Any:
        return RunAhead(lane)


def make_streams() -> Any:
    cpu_stream.launch_one_at_a_time()
    return Streams(exchange_kernels(interpreted=True))


def word_streams(memory: tuple[int, int]) -> Iterator[tuple[str, LaneStream]]:
    stream = RunAhead(0)
    stream.enter()
    yield "thread", stream


gpu_setup.make_streams, gpu_setup.word_streams = make_streams, word_streams

if __name__ == "__main__":
    torch.cuda.CUDAGraph, torch.cuda.graph = CpuGraph, capture  # type: ignore[misc, assignment]
    if "--call" in sys.argv:
        cpu_stream.use_streams()
    gpu.main()
