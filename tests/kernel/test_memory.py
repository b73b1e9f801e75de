"""The arena and the thread pool that the kernel works with."""

import os

import numpy as np
import pytest

from vllm_lamina.kernels import Arena, ThreadPool


def test_arena_is_zero_and_aligned() -> None:
    arena = Arena(3 << 20)
    memory = arena.array()
    assert arena.size == memory.size == 4 << 20
    assert memory.ctypes.data % (2 << 20) == 0
    assert not memory.any()


def test_arena_array_keeps_the_memory_alive() -> None:
    memory = Arena(1 << 20).array()
    memory[:] = 1
    assert int(memory.sum()) == 2 << 20


def test_arena_refuses_what_cannot_be_mapped() -> None:
    with pytest.raises(MemoryError):
        Arena(1 << 62)
    with pytest.raises(MemoryError):
        Arena(np.iinfo(np.uint64).max)


def test_thread_pool_checks_its_arguments() -> None:
    cpu = min(os.sched_getaffinity(0))
    assert ThreadPool(2, [cpu, cpu]).size == 2
    with pytest.raises(ValueError, match="at least 1 thread, not 0"):
        ThreadPool(0)
    with pytest.raises(ValueError, match="name one CPU per thread or none: 1 CPUs for 2 threads"):
        ThreadPool(2, [cpu])
    with pytest.raises(ValueError, match="cannot pin a thread to CPU 1000"):
        ThreadPool(2, [cpu, 1000])
