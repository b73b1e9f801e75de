"""Choosing which free KV blocks a request gets: vLLM takes the least recently used, from one queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from vllm.v1.request import Request


class FreeBlocks(Protocol):
    """What vLLM's block pool asks of its queue of free blocks once it is built."""

    @property
    def num_free_blocks(self) -> int: ...
    def popleft_n(self, n: int) -> list[KVCacheBlock]: ...
    def remove(self, block: KVCacheBlock) -> None: ...
    def append_n(self, blocks: list[KVCacheBlock]) -> None: ...
    def prepend_n(self, blocks: list[KVCacheBlock]) -> None: ...


def queue_of(blocks: Iterable[KVCacheBlock]) -> FreeKVCacheBlockQueue:
    """vLLM's own queue, over some of the blocks."""
    return FreeKVCacheBlockQueue(list(blocks))


def all_blocks(manager: KVCacheManager) -> list[KVCacheBlock]:
    """Every block that requests can get, by id: all but vLLM's null block."""
    return [block for block in manager.block_pool.blocks if not block.is_null]


def blocks_by_request(manager: KVCacheManager) -> Mapping[str, list[KVCacheBlock]]:
    """The blocks that each request holds, in the order of its tokens; kept up to date by vLLM."""
    [of_full_attention] = manager.coordinator.single_type_managers
    blocks: Mapping[str, list[KVCacheBlock]] = of_full_attention.req_to_blocks
    return blocks


def forget_cached(manager: KVCacheManager, block_ids: set[int]) -> None:
    """Let nobody hit these blocks as a cached prefix any more; requests that hold them keep them."""
    manager.block_pool.evict_blocks(block_ids)


def use_free_blocks(
    manager: KVCacheManager, free: FreeBlocks, asks: Callable[[Request, Callable[[], list[int]]], None]
) -> None:
    """Let a manager that has handed out no block yet take blocks from ``free``.

    Before it takes blocks for a request, ``asks`` is called with the request and a function that returns the ids of
    those that the request holds when it is called, cached ones that it just hit included.
    """
    pool, allocate_slots = manager.block_pool, manager.allocate_slots
    assert pool.get_num_free_blocks() == len(all_blocks(manager))

    def allocate_slots_for(request: Request, *args: Any, **kwargs: Any) -> Any:
        asks(request, lambda: manager.get_block_ids(request.request_id)[0])
        return allocate_slots(request, *args, **kwargs)

    pool.free_block_queue = free
    manager.allocate_slots = allocate_slots_for
