"""How the attention workers of one engine divide its KV cache, and how much of it they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_lamina._native import Partition as NativePartition
from vllm_lamina.config import AUTO, HEAD, REQUEST, SEQUENCE
from vllm_lamina.errors import ConfigError
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.units import format_bytes, format_enough_bytes

ABOUT_EQUAL = 0.9
"""Smallest pool over largest from which `auto` divides by heads: what the larger ones have more is not used then."""

MANY_REQUESTS = 4
"""Requests of the longest kind that every pool must hold for `auto` to keep a request on one worker."""


@dataclass(frozen=True)
class Pool:
    """What one attention worker offers."""

    address: str
    num_bytes: int


@dataclass(frozen=True)
class Share:
    """What one attention worker holds of the KV cache.

    ``geometry`` has the worker's own heads; a block of them takes ``block_bytes`` of its pool, over all positions.
    """

    pool: Pool
    geometry: Geometry
    block_bytes: int
    num_blocks: int

    @property
    def heads(self) -> list[int]:
        """Of each cache's `Geometry.divisible_heads` those that it has."""
        return list(self.geometry.divisible_heads)


@dataclass(frozen=True)
class Partition:
    """The shares of all attention workers, in the order in which they were given.

    With ``head`` all workers hold the same blocks, each some heads of them. With ``sequence`` and ``request`` each
    holds blocks of its own: worker 0 the first ``num_blocks`` by vLLM's ids, worker 1 those that follow, and so on.
    """

    kind: str
    reason: str
    geometry: Geometry
    shares: tuple[Share, ...]

    @property
    def num_blocks(self) -> int:
        """KV blocks that all workers hold together."""
        counts = self.blocks_per_worker
        return min(counts) if self.kind == HEAD else sum(counts)

    def num_tokens(self, max_model_len: int, max_step_tokens: int = 0) -> int:
        """Tokens that all blocks hold together, of requests of ``max_model_len`` in steps of ``max_step_tokens``."""
        if (
            self.geometry.num_groups == 1
            and not self.geometry.groups[0].window
            and not self.geometry.groups[0].chunk
        ):
            return max(self.num_blocks - 1, 0) * self.geometry.block_size(0)
        return (
            max(self.num_blocks - 1, 0)
            * max_model_len
            // self.geometry.num_blocks(max_model_len, max_step_tokens)
        )

    @property
    def blocks_per_worker(self) -> list[int]:
        """KV blocks of each worker."""
        return [share.num_blocks for share in self.shares]

    def limited_to(self, num_blocks: int) -> Partition:
        """The same with ``num_blocks`` in all, in proportion to what each worker could hold.

        Raises
        ------
        ConfigError
            The workers hold fewer, or some would have none.
        """
        workers = len(self.shares)
        if not (1 if self.kind == HEAD else workers) <= num_blocks <= self.num_blocks:
            raise ConfigError(
                f"{num_blocks} KV blocks are asked for; {workers} attention worker(s) hold {self.num_blocks}: change "
                "--num-gpu-blocks-override, or the workers' --memory"
            )
        by_heads = self.kind == HEAD
        counts = [num_blocks] * workers if by_heads else _in_proportion(num_blocks, self.blocks_per_worker)
        shares = (
            dataclasses.replace(share, num_blocks=count)
            for share, count in zip(self.shares, counts, strict=True)
        )
        return dataclasses.replace(self, shares=tuple(shares))

    def to_native(self) -> NativePartition:
        """The same for native code."""
        geometry = self.geometry.to_native()
        if self.kind == HEAD:
            return NativePartition.by_heads(geometry, [share.heads for share in self.shares])
        return NativePartition.by_blocks(geometry, self.blocks_per_worker)

    def check_holds_one_request(
        self, max_model_len: int, sharing: int = 1, max_step_tokens: int = 0, spare_blocks: int = 0
    ) -> None:
        """Refuse pools in which a request of ``max_model_len`` tokens, in steps of ``max_step_tokens``, does not fit.

        ``sharing`` is the number of ranks whose pools ``--lamina-memory`` is for; ``spare_blocks`` must be left.

        Raises
        ------
        ConfigError
            Says which pool is too small, and how much is needed.
        """
        # One block more than the request's own: vLLM keeps block 0 for itself.
        needed = self.geometry.num_blocks(max_model_len, max_step_tokens) + 1 + spare_blocks
        if self.num_blocks >= needed:
            return
        tokens = self.num_tokens(max_model_len, max_step_tokens)
        request = f"one request of --max-model-len {max_model_len}"
        share = min(self.shares, key=lambda share: share.num_blocks)
        size, wanted = format_bytes(share.pool.num_bytes), format_enough_bytes(needed * share.block_bytes)
        if len(self.shares) == 1:
            memory = "--lamina-memory (or the worker's --memory) to at least that"
            if sharing > 1:
                total = format_enough_bytes(sharing * needed * share.block_bytes)
                memory = f"--lamina-memory, which {sharing} ranks share, to at least {total}"
            raise ConfigError(
                f"The attention worker's pool of {size} holds {tokens} tokens, but {request} needs {wanted}: raise "
                f"{memory}, or lower --max-model-len."
            )
        if self.kind == HEAD:
            kind = "query" if self.geometry.caches[0].latent else "KV"
            raise ConfigError(
                f"The pool of the attention worker at {share.pool.address} ({size}) holds {tokens} tokens of its "
                f"{share.heads[0]} of {self.geometry.divisible_heads[0]} {kind} heads, but {request} needs {wanted}: "
                "raise its --memory to at least that, lower --max-model-len, or try --lamina-partition sequence."
            )
        total = format_bytes(sum(share.pool.num_bytes for share in self.shares))
        raise ConfigError(
            f"The pools of the {len(self.shares)} attention workers ({total}) hold {tokens} tokens, but {request} "
            f"needs {wanted}: raise the --memory of any of them so that they have that together, or lower "
            "--max-model-len."
        )


def divide(
    wanted: str,
    pools: Sequence[Pool],
    geometry: Geometry,
    block_bytes: Callable[[int, Geometry], int],
    max_model_len: int,
) -> Partition:
    """Divide the KV cache over the attention workers.

    Parameters
    ----------
    wanted
        The option ``partition``.
    pools
        One for each worker.
    geometry
        Of the model: all heads.
    block_bytes
        Bytes that a block of a geometry takes in the pool of worker i.
    max_model_len
        Tokens of the longest request, by which ``auto`` chooses between ``request`` and ``sequence``.

    Raises
    ------
    ConfigError
        A cache has fewer KV heads than there are workers, or a pool is smaller than one block.
    """

    heads_of_caches = geometry.divisible_heads

    def share(worker: int, part: Geometry) -> Share:
        size = block_bytes(worker, part)
        return Share(pools[worker], part, size, pools[worker].num_bytes // size)

    def by_heads(reason: str) -> Partition:
        by_cache = [
            _divide_heads(heads, pools, cache.latent)
            for heads, cache in zip(heads_of_caches, geometry.caches, strict=True)
        ]
        shares = []
        for i in range(len(pools)):
            first, count = [sum(heads[:i]) for heads in by_cache], [heads[i] for heads in by_cache]
            shares.append(share(i, geometry.with_heads(first, count)))
        return Partition(HEAD, reason, geometry, tuple(shares))

    def by_blocks(kind: str, reason: str) -> Partition:
        shares = [share(i, geometry) for i in range(len(pools))]
        for empty in (share for share in shares if share.num_blocks == 0):
            raise ConfigError(
                f"The pool of the attention worker at {empty.pool.address} ({format_bytes(empty.pool.num_bytes)}) is "
                f"smaller than one KV block of {format_bytes(empty.block_bytes)}: raise its --memory, or leave it out."
            )
        return Partition(kind, reason, geometry, tuple(shares))

    if len(pools) == 1:
        return by_heads("one worker")
    if wanted == HEAD:
        return by_heads("as asked")
    if wanted != AUTO:
        return by_blocks(wanted, "as asked")
    sizes = [pool.num_bytes for pool in pools]
    even = all(heads % len(pools) == 0 for heads in heads_of_caches)
    heads = ", ".join(str(heads) for heads in sorted(set(heads_of_caches)))
    if geometry.has_latent_cache:
        why_not = "by head every worker would hold the whole latent cache"
    elif even and min(sizes) >= ABOUT_EQUAL * max(sizes):
        return by_heads(f"{heads} KV heads divide evenly, and the pools are about equal")
    else:
        why_not = "the pools differ" if even else f"{heads} KV heads do not divide by {len(pools)}"
    partition = by_blocks(SEQUENCE, f"{why_not}, and long requests would not fit one worker several times")
    longest = geometry.num_blocks(max_model_len)
    if min(partition.blocks_per_worker) >= MANY_REQUESTS * longest:
        reason = f"{why_not}, and every pool holds {MANY_REQUESTS} of the longest requests or more"
        return dataclasses.replace(partition, kind=REQUEST, reason=reason)
    return partition


def _divide_heads(num_heads: int, pools: Sequence[Pool], latent: bool) -> list[int]:
    """Heads of each worker, at least one, so that the worker that holds the fewest tokens holds the most it can.

    Of a latent cache all workers hold as much, and have as many heads.
    """
    if num_heads < len(pools):
        raise ConfigError(
            f"--lamina-partition head needs a {'query' if latent else 'KV'} head for every attention worker; the model "
            f"has {num_heads} for {len(pools)} workers: choose --lamina-partition sequence or request, or use fewer "
            "workers"
        )
    counts = [1] * len(pools)
    for _ in range(num_heads - len(pools)):
        roomiest = max(
            range(len(pools)), key=lambda i: (1 if latent else pools[i].num_bytes) / (counts[i] + 1)
        )
        counts[roomiest] += 1
    return counts


def _in_proportion(total: int, capacities: Sequence[int]) -> list[int]:
    """``total`` as a sum of one number for each capacity, from 1 to the capacity, in proportion (largest remainder)."""
    rest, room = total - len(capacities), sum(capacities) - len(capacities)
    quotas = [rest * (capacity - 1) / max(room, 1) for capacity in capacities]
    counts = [1 + int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: int(quotas[i]) - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
