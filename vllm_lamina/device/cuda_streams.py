"""A lane's work on a CUDA GPU: kernels on the current stream, words by the driver's stream memory operations.

Written against CUDA 12 and 13, not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_lamina.device import exchange_kernels
from vllm_lamina.errors import LaminaError

POLLS = 2**31 - 1
"""Where a kernel waits: for longer than the host needs to notice that a worker is lost, and to write poison."""

_MAPPED = 2  # cudaHostRegisterMapped


class CudaStreams:
    """See `Streams`."""

    pack = staticmethod(exchange_kernels.pack)
    take = staticmethod(exchange_kernels.take)

    def __init__(self) -> None:
        self._registered: list[int] = []
        self._driver = _driver()
        self._failed = torch.zeros(1, dtype=torch.int32, pin_memory=True)

    def register(self, memories: Sequence[tuple[int, int]]) -> None:
        runtime = torch.cuda.cudart()
        for address in self._registered:
            _check(runtime.cudaHostUnregister(address), "cannot give memory back to the host")
        self._registered = []
        for address, num_bytes in memories:
            _check(
                runtime.cudaHostRegister(address, num_bytes, _MAPPED),
                f"cannot reach {num_bytes} bytes of the host's memory: raise the limit on locked memory (ulimit -l)",
            )
            self._registered.append(address)

    def stream(self, lane: int) -> CudaStream:
        return CudaStream(self._driver, self._failed, torch.cuda.current_device())

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        host = torch.zeros(*shape, dtype=dtype, pin_memory=True)
        return host.cuda(), host


class CudaStream:
    """See `Stream`: the one that is PyTorch's current one on the lane's thread."""

    def __init__(self, driver: Any, failed: torch.Tensor, device: int) -> None:
        self._driver = driver
        self._failed = failed
        self._device = device

    def enter(self) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(torch.cuda.Stream())

    def run(self, launch: Callable[[], None]) -> None:
        launch()

    def write(self, word: int, value: int) -> None:
        if self._driver is None:
            exchange_kernels.write_word(_tensor_at(word), value)
            return
        # By default what came before is seen first, by the host too.
        (status,) = self._driver.cuStreamWriteValue32(_current(), word, value, 0)
        _check(status, "cannot write a word from a stream")

    def wait(self, word: int, value: int) -> None:
        if self._driver is None:
            exchange_kernels.wait_word(_tensor_at(word), value, self._failed, POLLS)
            return
        at_least = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        (status,) = self._driver.cuStreamWaitValue32(_current(), word, value, int(at_least))
        _check(status, "cannot wait for a word on a stream")

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream().record_event()

    def wait_for(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(mark)

    def fence(self) -> None:
        pass  # PyTorch's operators go to the same stream

    def synchronize(self) -> None:
        torch.cuda.current_stream().synchronize()


def _driver() -> Any:
    """The driver's API, which the package cuda-bindings has (PyTorch requires it); None without."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def _current() -> int:
    stream: int = torch.cuda.current_stream().cuda_stream
    return stream


def _tensor_at(word: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_int32 * 1).from_address(word), dtype=torch.int32)


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise LaminaError(f"CUDA: {what} (error {int(status)})")
