"""What layers keep of a request beside its KV: the states of Mamba, gated delta nets and short convolutions, which stay on
the model worker.

vLLM hands out blocks for states and for KV from one pool of ids. Here the first ids are those of states: the model worker
holds so many blocks, and the attention workers hold the others. There are as many as the requests that may run at a time
can need, whatever the attention workers hold, and the scheduler gives them to states alone (`compat.kv_blocks`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheTensor, MambaSpec, UniformTypeKVCacheSpecs

ALIGNMENT = 64
"""Of a layer's state, in bytes: a line of the processor's cache."""

KEPT_PREFIXES = 2
"""Cached states per request that may run, where prefixes are cached."""


def is_state(spec: Any) -> bool:
    """Whether a KV cache spec is that of a layer that keeps a state."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return all(map(is_state, spec.kv_cache_specs.values()))
    return isinstance(spec, MambaSpec)


@dataclass(frozen=True)
class States:
    """The states of one model worker.

    Attributes
    ----------
    num_blocks
        Blocks that hold them, vLLM's null block included; 0 where the model has no states.
    layers
        Names of the layers that keep one, by group of layers with one block per state.
    layer_bytes
        Bytes of one layer in one block.
    """

    num_blocks: int
    layers: Sequence[Sequence[str]] = ()
    layer_bytes: int = 0

    @classmethod
    def of(cls, config: VllmConfig, groups: Sequence[KVCacheGroupSpec]) -> States:
        """Those of a model with these groups, for as many requests as may run at a time."""
        per_request, layers, layer_bytes = 0, [], 0
        for group in groups:
            if not is_state(group.kv_cache_spec):
                continue
            specs = _specs(group)
            per_request += max(map(_blocks_per_request, specs))
            layers.append(group.layer_names)
            layer_bytes = max(layer_bytes, *(spec.state_content_size_bytes for spec in specs))
        if not layers:
            return cls(0)
        num_blocks = 1 + config.scheduler_config.max_num_seqs * per_request
        return cls(num_blocks, layers, -(-layer_bytes // ALIGNMENT) * ALIGNMENT)

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


def _specs(group: KVCacheGroupSpec) -> list[MambaSpec]:
    spec: Any = group.kv_cache_spec
    return list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]


def _blocks_per_request(spec: MambaSpec) -> int:
    """The most that a group holds for a request, and those that it may leave in the prefix cache."""
    if spec.mamba_cache_mode == "none":
        return 1
    # The state that a step begins with, the one that it leaves, and one within a chunk.
    return 2 + spec.num_prefill_checkpoint_blocks + KEPT_PREFIXES
