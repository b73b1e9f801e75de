"""Which attention worker a request's KV blocks go to, where each worker holds blocks of its own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_lamina.compat.config import attention_workers, block_placement
from vllm_lamina.compat.free_blocks import all_blocks, queue_of, use_free_blocks
from vllm_lamina.compat.outputs import reported_times
from vllm_lamina.compat.stat_loggers import attach_stats, front_end_logs
from vllm_lamina.config import SEQUENCE
from vllm_lamina.scheduler.recovery import RecoveringScheduler


class PlacedBlocks:
    """vLLM's free KV blocks, in one queue (least recently used first) for each attention worker.

    Any block serves any request, so what a request gets is never refused for want of the right one:

    - ``sequence``: the worker that holds least of the request in proportion to its pool, which is round robin where
      pools are equal; of several such the one with the largest part of its pool free.
    - ``request``: the worker that holds most of the request, its cached prefix included. A request that holds nothing
      goes to a worker that has room for all of its tokens, if there is one, and of several to the one with the largest
      part of its pool free. Where that worker has no block left, the rest spills to another.

    Parameters
    ----------
    kind
        The partition, ``sequence`` or ``request``.
    blocks
        All blocks, by id, but those that nobody may get.
    blocks_per_worker
        Number of blocks of each worker, whose ids follow one another.
    block_size
        Tokens per block.
    """

    def __init__(
        self, kind: str, blocks: Sequence[KVCacheBlock], blocks_per_worker: Sequence[int], block_size: int
    ) -> None:
        self._choose = self._next_of_sequence if kind == SEQUENCE else self._next_of_request
        self._ends = list(accumulate(blocks_per_worker))
        self._sizes = blocks_per_worker
        self._block_size = block_size
        self._workers = range(len(blocks_per_worker))
        self._queues = [
            queue_of(block for block in blocks if self.worker_of(block.block_id) == worker)
            for worker in self._workers
        ]
        self._usable = set(self._workers)
        self._given = [queue.num_free_blocks for queue in self._queues]
        """Blocks of each worker that requests may get: not vLLM's null block."""
        self._num_tokens = 0
        self._held_blocks: Callable[[], list[int]] = list

    def worker_of(self, block_id: int) -> int:
        """The worker that holds a block."""
        return bisect_right(self._ends, block_id)

    def blocks_of(self, worker: int) -> range:
        """Ids of a worker's blocks."""
        return range(self._ends[worker] - self._sizes[worker], self._ends[worker])

    def serve(self, request: Request, held_blocks: Callable[[], list[int]]) -> None:
        """The blocks taken from now on are for this request; ``held_blocks`` returns those it has."""
        self._num_tokens, self._held_blocks = request.num_tokens, held_blocks

    def go_on_without(self, workers: Iterable[int]) -> None:
        """Hand out no block of these workers, and of no others, until told otherwise."""
        self._usable = set(self._workers) - set(workers)

    @property
    def usage(self) -> list[float]:
        """For each worker the part of its blocks that requests hold."""
        return [
            1 - queue.num_free_blocks / size if size else 0.0
            for queue, size in zip(self._queues, self._given, strict=True)
        ]

    @property
    def num_usable_blocks(self) -> int:
        """Blocks of all workers that are there, but those that nobody may get."""
        return sum(self._given[worker] for worker in self._usable)

    @property
    def num_free_blocks(self) -> int:
        """Free blocks of all workers that are there."""
        return sum(self._queues[worker].num_free_blocks for worker in self._usable)

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Take ``n`` blocks for the request at hand; there must be as many."""
        held = [0] * len(self._queues)
        for block_id in self._held_blocks():
            held[self.worker_of(block_id)] += 1
        blocks = []
        for _ in range(n):
            worker = self._choose(held)
            held[worker] += 1
            blocks.append(self._queues[worker].popleft())
        return blocks

    def remove(self, block: KVCacheBlock) -> None:
        """Take a free block, which a request hit in the prefix cache."""
        self._queues[self.worker_of(block.block_id)].remove(block)

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        """Give back blocks, to be used last."""
        for queue, part in zip(self._queues, self._by_worker(blocks), strict=True):
            queue.append_n(part)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Give back blocks, to be used first."""
        for queue, part in zip(self._queues, self._by_worker(blocks), strict=True):
            queue.prepend_n(part)

    def _by_worker(self, blocks: list[KVCacheBlock]) -> list[list[KVCacheBlock]]:
        parts: list[list[KVCacheBlock]] = [[] for _ in self._workers]
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
        needed = -(-self._num_tokens // self._block_size)
        roomy = [worker for worker in free if self._queues[worker].num_free_blocks >= needed]
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


class PlacingScheduler(RecoveringScheduler):
    """A scheduler whose requests get their KV blocks where the partition wants them.

    Its statistics carry Lamina's.

    ``placed_blocks`` is None where all workers hold the same blocks.
    """

    placed_blocks: PlacedBlocks | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        placement = block_placement(self.vllm_config)
        if placement is not None:
            manager = self.kv_cache_manager
            self.placed_blocks = PlacedBlocks(
                placement[0], all_blocks(manager), placement[1], self.block_size
            )
            use_free_blocks(manager, self.placed_blocks, self.placed_blocks.serve)

    def _blocks_of_workers(self, workers: Iterable[int]) -> set[int]:
        if self.placed_blocks is None:
            return super()._blocks_of_workers(workers)
        return {block_id for worker in workers for block_id in self.placed_blocks.blocks_of(worker)}

    def _go_on_without(self, workers: Iterable[int]) -> None:
        if self.placed_blocks is not None:
            self.placed_blocks.go_on_without(workers)

    def _num_usable_blocks(self) -> int:
        return (
            super()._num_usable_blocks()
            if self.placed_blocks is None
            else self.placed_blocks.num_usable_blocks
        )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Take the output of a step, and count it."""
        self.engine_metrics.observe(reported_times(model_runner_output))
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics of a step, with Lamina's in them."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and front_end_logs(self.vllm_config):
            attach_stats(stats, self._take_metrics(stats.kv_cache_usage))
        return stats

    @property
    def batches_in_flight(self) -> int:
        """Batches that have running requests."""
        return 1 if self.running else 0

    def _take_metrics(self, kv_usage: float) -> dict[str, Any]:
        workers: list[str] = []
        usages: list[float] = []
        for rank in attention_workers(self.vllm_config):
            workers += rank
            usages += self.placed_blocks.usage if self.placed_blocks is not None else [kv_usage] * len(rank)
        return self.engine_metrics.take(workers, usages, self.batches_in_flight)
