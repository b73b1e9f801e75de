"""vLLM's KV blocks: which ones a request holds, which it gets, and which the prefix cache must forget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, Protocol

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_lamina.compat.states import is_state

Span = tuple[int, int, list[tuple[int, int]]]
"""Tokens [begin, end) of a request, and the blocks that hold them: the first token that each can hold, and its id.

Where layers are of several groups, each group has blocks of its own for a token, or none any more.
"""


class FreeBlocks(Protocol):
    """What vLLM's block pool asks of its queue of free blocks once it is built."""

    @property
    def num_free_blocks(self) -> int: ...
    def popleft_n(self, n: int) -> list[KVCacheBlock]: ...
    def remove(self, block: KVCacheBlock) -> None: ...
    def append_n(self, blocks: list[KVCacheBlock]) -> None: ...
    def prepend_n(self, blocks: list[KVCacheBlock]) -> None: ...


class Serve(Protocol):
    """Told before blocks are taken for one group's part of a request."""

    def __call__(
        self, num_needed: int, held: Callable[[], list[int]], held_by_group: Callable[[], list[int]]
    ) -> None:
        """The request holds at most so many blocks; the functions return the ids of those that it has, and of the
        group's, when they are called, cached ones that it just hit included.
        """


def queue_of(blocks: Iterable[KVCacheBlock]) -> FreeKVCacheBlockQueue:
    """vLLM's own queue, over some of the blocks."""
    return FreeKVCacheBlockQueue(list(blocks))


class KVBlocks:
    """The KV blocks of a ``KVCacheManager``: one pool, of which each group of layers holds some for a request.

    Groups of layers that keep states have blocks of another pool, see `states.keep_apart`: none of these counts here.

    A group may hold tokens for a time only: behind a window, or before a chunk, vLLM's null block is in the place of
    what it has given back, and is nobody's.

    Attributes
    ----------
    usable
        Every block that requests can get, by id: all but vLLM's null block.
    ids
        The ids of all blocks.
    has_states
        The model keeps states beside its KV.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self.usable = [block for block in manager.block_pool.blocks if not block.is_null]
        self.ids = range(len(manager.block_pool.blocks))
        self._manager = manager
        groups = manager.coordinator.single_type_managers
        self._groups = [group for group in groups if not is_state(group.kv_cache_spec)]
        self.has_states = len(self._groups) < len(groups)
        self._block_sizes = [group.block_size for group in self._groups]
        self._most_held = [group.max_admission_blocks_per_request or sys.maxsize for group in self._groups]
        """By group: the most blocks that it holds for a request, of whatever length."""

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
        """Ids of the blocks that a request has, group by group; some may be for tokens to come."""
        return [block_id for group in self._groups for block_id in _held(group, name)]

    def of_tokens(self, name: str, begin: int, end: int) -> list[tuple[int, int]]:
        """Those that hold its tokens [begin, end), group by group: the first token that each can hold, and its id."""
        found = []
        for size, group in zip(self._block_sizes, self._groups, strict=True):
            blocks = group.req_to_blocks.get(name, ())[begin // size : -(-end // size)]
            first_tokens = range(begin // size * size, end, size)
            found += [(t, b.block_id) for t, b in zip(first_tokens, blocks, strict=False) if not b.is_null]
        return found

    def needed(self, num_tokens: int) -> int:
        """The most blocks that a request of so many tokens holds at a time, if it finds nothing in the prefix cache."""
        return sum(
            min(-(-num_tokens // size), most)
            for size, most in zip(self._block_sizes, self._most_held, strict=True)
        )

    def lacking_to_run(self, name: str, num_tokens: int) -> int:
        """How many of them a request lacks."""
        return self._lacking(name, num_tokens, self._most_held)

    def lacking(self, name: str, num_tokens: int) -> int:
        """How many blocks a running request lacks for a step that ends with so many tokens of it."""
        return self._lacking(name, num_tokens, repeat(sys.maxsize))

    def _lacking(self, name: str, num_tokens: int, most_held: Iterable[int]) -> int:
        # As vLLM's `get_num_blocks_to_allocate`. A block that was given back keeps its place.
        return sum(
            max(0, min(-(-num_tokens // size), most) - len(group.req_to_blocks.get(name, ())))
            for size, most, group in zip(self._block_sizes, most_held, self._groups, strict=False)
        )

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

    def take_from(self, free: FreeBlocks, serve: Serve) -> None:
        """Take blocks from ``free``, which has them all, from now on; no block may have been handed out yet.

        Before blocks are taken for a group's part of a request, ``serve`` is told.
        """
        manager, allocate_slots = self._manager, self._manager.allocate_slots
        assert self.num_free == len(self.usable)
        num_needed = 0

        def allocate_slots_for(request: Request, *args: Any, **kwargs: Any) -> Any:
            nonlocal num_needed
            num_needed = self.needed(request.num_tokens)
            return allocate_slots(request, *args, **kwargs)

        def allocate_of_group(group: SingleTypeKVCacheManager) -> Callable[..., list[KVCacheBlock]]:
            allocate_new_blocks = group.allocate_new_blocks

            def allocate(request_id: str, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
                serve(num_needed, lambda: self.of(request_id), lambda: _held(group, request_id))
                blocks: list[KVCacheBlock] = allocate_new_blocks(request_id, *args, **kwargs)
                return blocks

            return allocate

        manager.block_pool.free_block_queue = free
        manager.allocate_slots = allocate_slots_for
        for group in self._groups:
            group.allocate_new_blocks = allocate_of_group(group)


def _held(group: SingleTypeKVCacheManager, name: str) -> list[int]:
    """Ids of the blocks that a group holds for a request."""
    return [block.block_id for block in group.req_to_blocks.get(name, ()) if not block.is_null]
