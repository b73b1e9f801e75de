"""What layers keep of a request beside its KV: states of Mamba, gated delta nets and short convolutions.

They stay on the model worker, in blocks of their own: as many as the requests that may run at a time need, whatever the
attention workers hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import (
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)

ALIGNMENT = 64
"""Of a layer's state, in bytes: a line of the processor's cache."""


def is_state(spec: Any) -> bool:
    """Whether a KV cache spec is that of a layer that keeps a state."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return all(map(is_state, spec.kv_cache_specs.values()))
    return isinstance(spec, MambaSpec)


def expected_bytes(config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> int:
    """Bytes of the states of as many requests as may run at a time, by the layers' specs."""
    per_request = sum(spec.state_content_size_bytes for spec in specs.values() if isinstance(spec, MambaSpec))
    return int(config.scheduler_config.max_num_seqs * per_request)


@dataclass(frozen=True)
class States:
    """The states of one model worker.

    Attributes
    ----------
    num_blocks
        Blocks that hold them, vLLM's null block included, which is nobody's; 0 where the model has no states.
    layers
        Names of the layers that keep one, by group of layers with one block for each request.
    layer_bytes
        Bytes of one layer in one block.
    """

    num_blocks: int = 0
    layers: Sequence[Sequence[str]] = ()
    layer_bytes: int = 0

    @classmethod
    def of(cls, config: VllmConfig, groups: Sequence[KVCacheGroupSpec]) -> States:
        """Those of a model with these groups, for as many requests as may run at a time."""
        kept = [group for group in groups if is_state(group.kv_cache_spec)]
        if not kept:
            return cls()
        largest = max(spec.state_content_size_bytes for group in kept for spec in _specs(group))
        return cls(
            num_blocks=1 + config.scheduler_config.max_num_seqs * len(kept),
            layers=[group.layer_names for group in kept],
            layer_bytes=-(-largest // ALIGNMENT) * ALIGNMENT,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them. Groups overlay one another, for a block is of one group at a time."""
        return self.num_blocks * self.layer_bytes * max(map(len, self.layers), default=0)

    def added_to(self, kv_cache_config: Any) -> Any:
        """The ``KVCacheConfig`` for a model runner that allocates them, of one that has nothing allocated."""
        if not self.num_blocks:
            return kv_cache_config
        stride = self.num_blocks * self.layer_bytes
        tensors = [
            KVCacheTensor(
                size=self.num_bytes,
                layers=[name],
                layer_stride=stride,
                block_stride=self.layer_bytes,
                offset=position * stride,
            )
            for names in self.layers
            for position, name in enumerate(names)
        ]
        return dataclasses.replace(kv_cache_config, num_blocks=self.num_blocks, kv_cache_tensors=tensors)


def keep_apart(manager: KVCacheManager, num_blocks: int) -> None:
    """Let groups of states take blocks of a pool of so many, and the others alone those of the manager's.

    No block may have been handed out yet. vLLM frees a block to the pool that it came from. It compares what a request
    needs with the manager's pool: a need of states counts there for nothing, or for more than there is.
    """
    coordinator: Any = manager.coordinator
    groups = [group for group in coordinator.single_type_managers if isinstance(group, MambaManager)]
    if not groups:
        return
    pool = BlockPool(num_blocks, enable_caching=False, hash_block_size=manager.block_pool.hash_block_size)
    num_needed = 0

    def noted(count: Callable[..., int]) -> Callable[..., int]:
        def counted(*args: Any, **kwargs: Any) -> int:
            nonlocal num_needed
            num_needed += count(*args, **kwargs)
            return 0

        return counted

    for group in groups:
        group.block_pool, group._null_block = pool, pool.null_block
        group.get_num_blocks_to_allocate = noted(group.get_num_blocks_to_allocate)
    count_all = coordinator.get_num_blocks_to_allocate

    def kv_blocks_to_allocate(*args: Any, **kwargs: Any) -> int:
        nonlocal num_needed
        num_needed = 0
        num_kv_blocks: int = count_all(*args, **kwargs)
        is_short = num_needed > pool.get_num_free_blocks()
        return manager.block_pool.num_gpu_blocks + 1 if is_short else num_kv_blocks

    coordinator.get_num_blocks_to_allocate = kv_blocks_to_allocate


def _specs(group: KVCacheGroupSpec) -> Sequence[MambaSpec]:
    spec: Any = group.kv_cache_spec
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
