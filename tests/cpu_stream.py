"""A device that works beside the host, played by a thread of the CPU for each lane.

Its kernels are those of a GPU, in Triton's interpreter. PyTorch's operators run on the host, so that it waits for the
stream after each layer's exchange; meanwhile other lanes go on. A graph that was captured is replayed by the stream.
"""

from __future__ import annotations

import ctypes
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from cpu_graph import THREAD, captured

from vllm_lamina.device.cpu import CpuDevice

DEADLINE = 60.0

COUNTS: Counter[str] = Counter()
"""``layers on streams``: exchanges that the host enqueued; ``replays of lane ..``: graphs."""


class CpuStream:
    """Executes what is enqueued, in order, on a thread of its own. `pause` is called before each operation."""

    def __init__(self, pause: Callable[[], None] = lambda: None) -> None:
        self._pause = pause
        self._error: BaseException | None = None
        self._operations: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def enqueue(self, operation: Callable[[], None]) -> None:
        graph = captured()
        if graph is None:
            self._operations.put(operation)
        else:
            graph.operations.append(operation)
            graph.streams.add(self)

    def write(self, word: int, value: int) -> None:
        self.enqueue(lambda: store(word, value))

    def wait(self, word: int, value: int) -> None:
        """Until the word is at least ``value``."""

        def wait() -> None:
            end = time.monotonic() + DEADLINE
            while load(word) < value:
                assert time.monotonic() < end, "a stream waits for ever"
                time.sleep(0)

        self.enqueue(wait)

    def synchronize(self) -> None:
        """Wait until all that was enqueued is over; its error, if any, is raised here."""
        over = threading.Event()
        self.enqueue(over.set)
        assert over.wait(2 * DEADLINE)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._operations.put(None)
        self._thread.join(DEADLINE)

    def _run(self) -> None:
        while (operation := self._operations.get()) is not None:
            try:
                self._pause()
                operation()
            except BaseException as error:
                self._error = error


def load(word: int) -> int:
    return ctypes.c_int32.from_address(word).value


def store(word: int, value: int) -> None:
    ctypes.c_int32.from_address(word).value = value


class LaneStream(CpuStream):
    """A stream that a lane's thread waits for, while it lets others have the turn. It dawdles at random."""

    def __init__(self, lane: int) -> None:
        self.lane = lane
        rng = random.Random(lane)
        super().__init__(lambda: time.sleep(0.002 * (rng.random() < 0.05)))

    def run(self, launch: Callable[[], None]) -> None:
        def run() -> None:
            with torch.inference_mode():
                launch()

        if captured():
            launch()  # what it launches is captured, and not what it does to find that out
        else:
            self.enqueue(run)

    def replay(self, operations: Sequence[Callable[[], None]]) -> None:
        COUNTS[f"replays of lane {self.lane}"] += 1
        for operation in operations:
            self.run(operation)
        self.fence()

    def enter(self) -> None:
        THREAD.stream = self

    def mark(self) -> threading.Event:
        done = threading.Event()
        self.enqueue(done.set)
        return done

    def wait_for(self, mark: threading.Event) -> None:
        self.enqueue(
            lambda: None if mark.wait(DEADLINE) else _fail("another stream does not come to its mark")
        )

    def fence(self) -> None:
        from vllm_lamina.attention_backend.exchange import Exchange
        from vllm_lamina.compat import forward_context

        if captured():
            return
        COUNTS["layers on streams"] += 1
        if Exchange.current().step(self.lane) is None:  # vLLM warms up, without a turn
            self.synchronize()
            return
        client: Any = Exchange.current().layers._client  # type: ignore[attr-defined]
        context = forward_context.take_aside()
        client.end_turn(self.lane)
        try:
            self.synchronize()
        finally:
            client.begin_turn(self.lane, DEADLINE)
            forward_context.put_back(context)


def _fail(why: str) -> None:
    raise AssertionError(why)


class CpuStreams:
    """See `Streams`. ``kernels`` is the module of the exchange's kernels, interpreted."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels

    def pack(self, *args: Any) -> None:
        _launch(self._kernels.pack, *args)

    def take(self, *args: Any) -> None:
        _launch(self._kernels.take, *args)

    def register(self, memories: Sequence[tuple[int, int]]) -> None:
        assert all(num_bytes > 0 for _, num_bytes in memories)

    def stream(self, lane: int) -> LaneStream:
        stream = LaneStream(lane)
        if lane == 0:  # a single one has no thread
            stream.enter()
        return stream

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(*shape, dtype=dtype), torch.zeros(*shape, dtype=dtype)


def _launch(kernel: Callable[..., None], *args: Any) -> None:
    graph = captured()
    if graph is None:
        kernel(*args)
    else:
        graph.operations.append(lambda: kernel(*args))


class StreamedCpuDevice(CpuDevice):
    """This host's CPU, as if it were a device beside the host."""

    def streams(self) -> Any:
        from vllm_lamina.device import exchange_kernels

        return CpuStreams(exchange_kernels)


@cache
def launch_one_at_a_time() -> None:
    """The interpreter has one grid at a time, where streams and lanes launch kernels of theirs."""
    from triton.runtime.interpreter import GridExecutor

    launch, one_launch = GridExecutor.__call__, threading.Lock()

    def launch_alone(grid: Any, *args: Any, **kwargs: Any) -> None:
        with one_launch:
            launch(grid, *args, **kwargs)

    GridExecutor.__call__ = launch_alone


def use_streams() -> None:
    """For the engines that this process makes from now on."""
    from vllm_lamina.worker.model_worker import worker

    launch_one_at_a_time()
    worker.device_for = lambda device_type: StreamedCpuDevice()
