"""PyTorch's thread count and vLLM's CPU binding: on which CPUs the model worker computes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch

from vllm_lamina.units import format_cpus

BIND = "VLLM_CPU_OMP_THREADS_BIND"
"""vLLM's variable for the CPUs of its CPU model workers: a CPU list a rank, separated by |, or auto, or nobind."""


@contextlib.contextmanager
def model_workers_bound_to(cpus_by_rank: Sequence[Sequence[int]]) -> Iterator[None]:
    """Let the model worker processes that start meanwhile run on these CPUs, by vLLM's own binding."""
    before = os.environ.get(BIND)
    os.environ[BIND] = "|".join(format_cpus(cpus) for cpus in cpus_by_rank)
    try:
        yield
    finally:
        if before is None:
            del os.environ[BIND]
        else:
            os.environ[BIND] = before


class ThisProcessOn:
    """Runs the calling thread, and the threads it starts from now on, on the given CPUs until `restore`."""

    def __init__(self, cpus: Sequence[int]) -> None:
        self._affinity = os.sched_getaffinity(0)
        self._num_threads = torch.get_num_threads()
        os.sched_setaffinity(0, cpus)
        set_num_threads(len(cpus))

    def restore(self) -> None:
        """Give the thread its CPUs back."""
        os.sched_setaffinity(0, self._affinity)
        set_num_threads(self._num_threads)


def set_num_threads(num_threads: int) -> None:
    """Threads of PyTorch's operators, for the calling thread and those that it starts."""
    # vLLM's CPU worker replaces torch.set_num_threads by a function that does nothing; this is the original.
    torch._C.set_num_threads(num_threads)
