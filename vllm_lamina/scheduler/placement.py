"""Which attention worker a request's KV blocks go to, and which blocks are lost with a worker."""

from __future__ import annotations

import abc
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Protocol

from vllm_lamina.compat.kv_blocks import queue_of
from vllm_lamina.config import SEQUENCE


class Block(Protocol):
    """A KV block of vLLM's."""

    block_id: int


class BlockPlacement(abc.ABC):
    """Where the KV blocks are. Workers go by their place in the partition."""

    @property
    @abc.abstractmethod
    def num_usable_blocks(self) -> int:
        """Blocks that requests may get from the workers that are there."""

    @abc.abstractmethod
    def blocks_of(self, workers: Iterable[int]) -> set[int]:
        """Ids of the blocks of which these workers hold a part."""

    @abc.abstractmethod
    def usage_of(self, worker: int) -> float:
        """The part of a worker's blocks that requests hold."""

    @abc.abstractmethod
    def go_on_without(self, workers: Iterable[int]) -> None:
        """Hand out no block of these workers, and of no others, until told otherwise."""

    @abc.abstractmethod
    def with_all_workers(self) -> AbstractContextManager[None]:
        """Count the free blocks of all workers meanwhile, of those that are down too; none may be handed out."""


class SharedBlocks(BlockPlacement):
    """Each worker holds its part of every block: vLLM may choose any, and without one worker there are none.

    Parameters
    ----------
    ids
        Of all blocks.
    num_usable
        Number of those that requests may get.
    usage
        Returns the part of them that requests hold.
    """

    def __init__(self, ids: Iterable[int], num_usable: int, usage: Callable[[], float]) -> None:
        self._ids = ids
        self._num_usable = num_usable
        self._usage = usage

    @property
    def num_usable_blocks(self) -> int:
        return self._num_usable

    def blocks_of(self, workers: Iterable[int]) -> set[int]:
        return set(self._ids) if any(True for _ in workers) else set()

    def usage_of(self, worker: int) -> float:
        return self._usage()

    def go_on_without(self, workers: Iterable[int]) -> None:
        assert not list(workers), "a block of which a part is missing serves nobody"

    def with_all_workers(self) -> AbstractContextManager[None]:
        return nullcontext()


class PlacedBlocks(BlockPlacement):
    """vLLM's free KV blocks, in one queue (least recently used first) for each attention worker.

    Any block serves any request, so what a request gets is never refused for want of the right one:

    - ``sequence``: the worker that holds least of the request in proportion to its pool, which is round robin where
      pools are equal; of several such the one with the largest part of its pool free. Each group of layers is divided
      for itself: a layer reads its group's blocks, and waits for the worker that has most of them.
    - ``request``: the worker that holds most of the request, its cached prefix included. A request that holds nothing
      goes to a worker that has room for all that it needs, if there is one, and of several to the one with the largest
      part of its pool free. Where that worker has no block left, the rest spills to another.

    Parameters
    ----------
    kind
        The partition, ``sequence`` or ``request``.
    blocks
        All blocks, by id, but those that nobody may get.
    blocks_per_worker
        Number of blocks of each worker, whose ids follow one another.
    """

    def __init__(self, kind: str, blocks: Sequence[Block], blocks_per_worker: Sequence[int]) -> None:
        self._by_group = kind == SEQUENCE
        self._choose = self._next_of_sequence if kind == SEQUENCE else self._next_of_request
        self._ends = list(accumulate(blocks_per_worker))
        self._sizes = blocks_per_worker
        self._workers = range(len(blocks_per_worker))
        self._queues = [
            queue_of(block for block in blocks if self.worker_of(block.block_id) == worker)
            for worker in self._workers
        ]
        self._usable = set(self._workers)
        self._given = [queue.num_free_blocks for queue in self._queues]
        """Blocks of each worker that requests may get: not vLLM's null block."""
        self._num_needed = 0
        self._held: Callable[[], list[int]] = list

    def worker_of(self, block_id: int) -> int:
        """The worker that holds a block."""
        return bisect_right(self._ends, block_id)

    def blocks_of(self, workers: Iterable[int]) -> set[int]:
        ranges = (range(self._ends[worker] - self._sizes[worker], self._ends[worker]) for worker in workers)
        return {block_id for ids in ranges for block_id in ids}

    def serve(
        self, num_needed: int, held: Callable[[], list[int]], held_by_group: Callable[[], list[int]]
    ) -> None:
        """The blocks taken from now on are for one group of a request that needs so many for all of its tokens.

        The functions return those that the request has, and those of them that are the group's.
        """
        self._num_needed, self._held = num_needed, held_by_group if self._by_group else held

    def go_on_without(self, workers: Iterable[int]) -> None:
        self._usable = set(self._workers) - set(workers)

    @contextmanager
    def with_all_workers(self) -> Iterator[None]:
        usable, self._usable = self._usable, set(self._workers)
        try:
            yield
        finally:
            self._usable = usable

    def usage_of(self, worker: int) -> float:
        size = self._given[worker]
        return 1 - self._queues[worker].num_free_blocks / size if size else 0.0

    @property
    def num_usable_blocks(self) -> int:
        return sum(self._given[worker] for worker in self._usable)

    @property
    def num_free_blocks(self) -> int:
        """Free blocks of all workers that are there."""
        return sum(self._queues[worker].num_free_blocks for worker in self._usable)

    def popleft_n(self, n: int) -> list[Block]:
        """Take ``n`` blocks for the request at hand; there must be as many."""
        held = [0] * len(self._queues)
        for block_id in self._held():
            held[self.worker_of(block_id)] += 1
        blocks = []
        for _ in range(n):
            worker = self._choose(held)
            held[worker] += 1
            blocks.append(self._queues[worker].popleft())
        return blocks

    def remove(self, block: Block) -> None:
        """Take a free block, which a request hit in the prefix cache."""
        self._queues[self.worker_of(block.block_id)].remove(block)

    def append_n(self, blocks: list[Block]) -> None:
        """Give back blocks, to be used last."""
        for queue, part in zip(self._queues, self._by_worker(blocks), strict=True):
            queue.append_n(part)

    def prepend_n(self, blocks: list[Block]) -> None:
        """Give back blocks, to be used first."""
        for queue, part in zip(self._queues, self._by_worker(blocks), strict=True):
            queue.prepend_n(part)

    def _by_worker(self, blocks: list[Block]) -> list[list[Block]]:
        parts: list[list[Block]] = [[] for _ in self._workers]
        for block in blocks:
            parts[self.worker_of(block.block_id)].append(block)
        return parts

    def _next_of_sequence(self, held: list[int]) -> int:
        # Sainte-Lague's rule of proportional seats: after any number of blocks each worker has its part, rounded.
        def already_has(worker: int) -> tuple[float, float]:
            return (2 * held[worker] + 1) / self._sizes[worker], -self._free_part(worker)

        return min(self._with_free_blocks(), key=already_has)

    def _next_of_request(self, held: list[int]) -> int:
        free = self._with_free_blocks()
        if any(held):
            return max(free, key=lambda worker: (held[worker], self._free_part(worker)))
        roomy = [worker for worker in free if self._queues[worker].num_free_blocks >= self._num_needed]
        if roomy:
            return max(roomy, key=self._free_part)
        return max(free, key=lambda worker: self._queues[worker].num_free_blocks)

    def _with_free_blocks(self) -> list[int]:
        return [
            worker
            for worker in self._workers
            if worker in self._usable and self._queues[worker].num_free_blocks
        ]

    def _free_part(self, worker: int) -> float:
        free: int = self._queues[worker].num_free_blocks
        return free / self._sizes[worker]
