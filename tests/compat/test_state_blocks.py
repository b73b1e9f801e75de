"""States have blocks of their own: what they take is nothing to the KV blocks, nor the other way round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import Request
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_lamina.compat.kv_blocks import KVBlocks
from vllm_lamina.compat.states import States, expected_bytes, keep_apart

MAX_NUM_SEQS, NUM_BLOCKS = 3, 9
FULL = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
STATE = MambaSpec(block_size=1024, shapes=((3, 5), (2, 4)), dtypes=(torch.bfloat16, torch.float32))
GROUPS = [
    KVCacheGroupSpec(["a.0", "a.1"], STATE),
    KVCacheGroupSpec(["b.0", "b.1"], FULL),
    KVCacheGroupSpec(["c.0"], STATE),
]
CONFIG: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MAX_NUM_SEQS))


def states() -> States:
    return States.of(CONFIG, GROUPS)


def manager() -> KVCacheManager:
    made = KVCacheManager(
        KVCacheConfig(NUM_BLOCKS, [], GROUPS), 1024, 1024, hash_block_size=32, enable_caching=False
    )
    keep_apart(made, states().num_blocks)
    return made


def request(name: str, num_tokens: int) -> Request:
    return Request(name, list(range(num_tokens)), SamplingParams(max_tokens=1), None)


def test_a_request_has_a_state_for_each_group() -> None:
    kept = manager()
    blocks = KVBlocks(kept)
    assert blocks.has_states
    pools = [group.block_pool for group in kept.coordinator.single_type_managers]
    assert pools[0] is pools[2] is not pools[1] is kept.block_pool
    running = [request(name, 32) for name in "abc"]
    for one in running:
        assert kept.allocate_slots(one, 32) is not None
        assert len(blocks.of(one.request_id)) == 1
    assert pools[0].get_num_free_blocks() == 0
    assert blocks.num_free == len(blocks.usable) - 3 == 5
    late = request("d", 32)
    assert kept.allocate_slots(late, 32) is None, "there are states for three"
    assert blocks.of("d") == []
    kept.free(running.pop())
    assert kept.allocate_slots(late, 32) is not None
    held = [kept.get_block_ids(name) for name in "abd"]
    assert len({ids for of_request in held for ids in (*of_request[0], *of_request[2])}) == 6
    # Steps in flight may hold back what is free: vLLM then gives all of it back to one pool.
    kept.block_pool.free_blocks(reversed(kept.pop_blocks_for_free(late)))
    assert (pools[0].get_num_free_blocks(), blocks.num_free) == (2, 6)
    assert kept.reset_prefix_cache() is False
    for one in running:
        kept.free(one)
    assert kept.reset_prefix_cache()


def test_a_request_that_finds_no_kv_takes_no_state() -> None:
    kept = manager()
    assert kept.allocate_slots(request("a", 32 * NUM_BLOCKS), 32 * NUM_BLOCKS) is None
    assert kept.coordinator.single_type_managers[0].block_pool.get_num_free_blocks() == 2 * MAX_NUM_SEQS


def test_states_lie_apart() -> None:
    """Every layer of a group, and every block; groups overlay one another, for a block is of one group."""
    kept = states()
    specs = {name: group.kv_cache_spec for group in GROUPS for name in group.layer_names}
    assert kept.num_blocks == 1 + 2 * MAX_NUM_SEQS
    assert kept.layer_bytes == 64  # (3 * 5 * 2 + 2 * 4 * 4) bytes, in whole lines
    assert kept.num_bytes == 7 * 64 * 2
    assert expected_bytes(CONFIG, specs) == MAX_NUM_SEQS * 3 * 62
    config = kept.added_to(KVCacheConfig(NUM_BLOCKS, [], GROUPS))
    assert config.num_blocks == 7
    tensors = allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout.LBHNC)
    assert tensors.keys() == {"a.0", "a.1", "c.0"}
    first = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert first["a.1"] - first["a.0"] == 7 * 64
    assert first["c.0"] == first["a.0"]


def test_a_model_without_states_has_none() -> None:
    groups = [GROUPS[1]]
    config = KVCacheConfig(NUM_BLOCKS, [], groups)
    assert States.of(CONFIG, groups).num_bytes == 0
    assert States.of(CONFIG, groups).added_to(config) is config
    kept = KVCacheManager(config, 1024, 32, hash_block_size=32, enable_caching=False)
    keep_apart(kept, 0)
    assert not KVBlocks(kept).has_states
