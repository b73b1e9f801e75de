"""vLLM's KV blocks: which ones a request holds, which it gets, and which the prefix cache must forget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


class KVBlocks:
    """The blocks of a ``KVCacheManager`` with full attention alone.

    Attributes
    ----------
    block_size
        Tokens per block.
    usable
        Every block that requests can get, by id: all but vLLM's null block.
    ids
        The ids of all blocks.
    """

    def __init__(self, manager: KVCacheManager, block_size: int) -> None:
        self.block_size = block_size
        self.usable = [block for block in manager.block_pool.blocks if not block.is_null]
        self.ids = range(len(manager.block_pool.blocks))
        self._manager = manager
        [of_full_attention] = manager.coordinator.single_type_managers
        self._by_request = of_full_attention.req_to_blocks
        """Kept up to date by vLLM."""

    @property
    def num_free(self) -> int:
        """Blocks that no request holds; some may be cached."""
        free: int = self._manager.block_pool.get_num_free_blocks()
        return free

    @property
    def num_admissible(self) -> int:
        """Of those, the ones that may go to requests that begin: vLLM keeps some for the others, if told so."""
        watermark: int = self._manager.watermark_blocks
        return self.num_free - watermark

    @property
    def usage(self) -> float:
        """Part of the blocks that requests hold."""
        usage: float = self._manager.usage
        return usage

    def of(self, name: str) -> list[int]:
        """Ids of the blocks that a request has, in the order of its tokens; some may be for tokens to come."""
        return [block.block_id for block in self._by_request.get(name, ())]

    def of_tokens(self, name: str, begin: int, end: int) -> list[int]:
        """Ids of those that hold its tokens [begin, end)."""
        size = self.block_size
        return [block.block_id for block in self._by_request.get(name, ())[begin // size : -(-end // size)]]

    def lacking(self, name: str, num_tokens: int) -> int:
        """How many blocks a request lacks for so many tokens of it, if it finds nothing in the prefix cache."""
        return max(0, -(-num_tokens // self.block_size) - len(self._by_request.get(name, ())))

    def share(
        self, reserved_from: Callable[[Request], int], make_room: Callable[[Request, int], bool]
    ) -> None:
        """Give a request no blocks of those that ``reserved_from`` says must be left after it.

        Where there are too few, ``make_room`` is called, and they are tried again for as long as it returns True. It
        gets the request, and how many of its tokens need blocks.
        """
        manager, allocate_slots = self._manager, self._manager.allocate_slots

        def allocate_shared_slots(
            request: Request, num_new_tokens: int, *args: Any, reserved_blocks: int = 0, **kwargs: Any
        ) -> Any:
            reserved = reserved_blocks + reserved_from(request)
            while True:
                blocks = allocate_slots(request, num_new_tokens, *args, reserved_blocks=reserved, **kwargs)
                if blocks is not None or not make_room(request, request.num_computed_tokens + num_new_tokens):
                    return blocks

        manager.allocate_slots = allocate_shared_slots

    def forget_cached(self, block_ids: set[int]) -> None:
        """Let nobody hit these blocks as a cached prefix any more; requests that hold them keep them."""
        self._manager.block_pool.evict_blocks(block_ids)

    def take_from(self, free: FreeBlocks, serve: Callable[[int, Callable[[], list[int]]], None]) -> None:
        """Take blocks from ``free``, which has them all, from now on; no block may have been handed out yet.

        Before blocks are taken for a request, ``serve`` is called with its number of tokens and a function that returns
        the ids of those that the request holds when it is called, cached ones that it just hit included.
        """
        manager, allocate_slots = self._manager, self._manager.allocate_slots
        assert self.num_free == len(self.usable)

        def allocate_slots_for(request: Request, *args: Any, **kwargs: Any) -> Any:
            serve(request.num_tokens, lambda: manager.get_block_ids(request.request_id)[0])
            return allocate_slots(request, *args, **kwargs)

        manager.block_pool.free_block_queue = free
        manager.allocate_slots = allocate_slots_for
