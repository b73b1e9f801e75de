"""Which worker's blocks a request gets, and what a lost worker takes with it, without a scheduler."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_lamina.scheduler.placement import PlacedBlocks, SharedBlocks


def placed_blocks(kind: str, sizes: Sequence[int]) -> PlacedBlocks:
    """Of workers with so many blocks each; nobody may get block 0, as in vLLM."""
    return PlacedBlocks(kind, [KVCacheBlock(i) for i in range(1, sum(sizes))], sizes)


def serve(placed: PlacedBlocks, num_blocks: int, held: Sequence[int] = ()) -> list[int]:
    """Take blocks for a request that holds some; returns on which workers they are."""
    placed.serve(num_blocks + len(held), lambda: list(held), lambda: list(held))
    return [placed.worker_of(block.block_id) for block in placed.popleft_n(num_blocks)]


def test_a_sequence_is_divided_in_proportion() -> None:
    placed = placed_blocks("sequence", [40, 20, 20])
    workers = serve(placed, 16)
    assert [workers.count(worker) for worker in range(3)] == [8, 4, 4]
    assert serve(placed, 2, held=[1, 2, 3, 41]) == [2, 1]


def test_a_request_stays_where_it_is_and_spills() -> None:
    placed = placed_blocks("request", [10, 30])
    assert serve(placed, 4) == [1] * 4, "the larger part is free"
    assert serve(placed, 8, held=[3]) == [0] * 8
    assert serve(placed, 3, held=[3]) == [0, 1, 1], "nothing is left there"


def test_no_block_of_a_worker_that_is_away() -> None:
    placed = placed_blocks("sequence", [10, 10, 10])
    assert (placed.num_usable_blocks, placed.num_free_blocks) == (29, 29)
    placed.go_on_without([1])
    assert (placed.num_usable_blocks, placed.num_free_blocks) == (19, 19)
    assert set(serve(placed, 19)) == {0, 2}
    assert placed.num_free_blocks == 0
    placed.go_on_without([])
    assert placed.num_free_blocks == 10
    assert serve(placed, 1) == [1]


def test_what_is_lost_with_workers_and_what_is_used() -> None:
    placed = placed_blocks("request", [10, 20, 10])
    assert placed.blocks_of([]) == set()
    assert placed.blocks_of([0, 2]) == {*range(10), *range(30, 40)}
    serve(placed, 5)
    assert [placed.usage_of(worker) for worker in range(3)] == [0, 0.25, 0]
    assert placed_blocks("request", [1, 5]).usage_of(0) == 0, "it has nothing but the block that nobody gets"


def test_blocks_that_all_workers_share() -> None:
    shared = SharedBlocks(range(10), num_usable=9, usage=lambda: 0.5)
    assert shared.num_usable_blocks == 9
    assert shared.blocks_of([]) == set()
    assert shared.blocks_of([1]) == set(range(10))
    assert shared.usage_of(0) == shared.usage_of(1) == 0.5
    shared.go_on_without([])
    with pytest.raises(AssertionError, match="part is missing"):
        shared.go_on_without([0])


@pytest.mark.parametrize("kind", ["sequence", "request"])
def test_the_queue_keeps_the_order_of_each_worker(kind: str) -> None:
    """Against lists: blocks come back as they were given, at the head or at the tail, and leave from the head."""
    rng = random.Random(0)
    blocks = [KVCacheBlock(i) for i in range(40)]
    placed = PlacedBlocks(kind, blocks, [10, 5, 25])
    model: list[list[int]] = [list(range(10)), list(range(10, 15)), list(range(15, 40))]
    taken: list[KVCacheBlock] = []
    for _ in range(3000):
        match rng.randrange(4):
            case 0 if placed.num_free_blocks:
                for block in placed.popleft_n(rng.randint(1, min(6, placed.num_free_blocks))):
                    assert model[placed.worker_of(block.block_id)].pop(0) == block.block_id
                    taken.append(block)
            case 1 if placed.num_free_blocks:
                block_id = rng.choice([i for ids in model for i in ids])
                placed.remove(blocks[block_id])
                model[placed.worker_of(block_id)].remove(block_id)
                taken.append(blocks[block_id])
            case 2 | 3 as where if taken:
                rng.shuffle(taken)
                back, taken = taken[:4], taken[4:]
                (placed.append_n if where == 2 else placed.prepend_n)(back)
                for worker, ids in enumerate(model):
                    mine = [b.block_id for b in back if placed.worker_of(b.block_id) == worker]
                    model[worker] = ids + mine if where == 2 else mine + ids
        assert placed.num_free_blocks == sum(map(len, model))
