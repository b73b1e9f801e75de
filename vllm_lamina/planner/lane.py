"""Keeps one batch in flight of the simulator: its requests, their contexts and their KV blocks, in O(1) per step."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count

from vllm_lamina.errors import ConfigError


class BlockPool:
    """Free KV blocks of one shard of the cache."""

    __slots__ = ("block_size", "free", "total")

    def __init__(self, tokens: int, block_size: int) -> None:
        self.block_size = block_size
        self.total = tokens // block_size
        self.free = self.total
        if self.total < 1:
            raise ConfigError(f"the KV cache holds {tokens} tokens, less than one block of {block_size}")

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens occupy."""
        return -(-tokens // self.block_size)


class Request:
    """One request on its way.

    `cached` counts its tokens in the KV cache when it joined the lane; each step of the lane since then added one.
    `ticket` is unique to each joining and 0 while it waits; `preempted` is when it lost its blocks, or negative.
    """

    __slots__ = (
        "arrival",
        "cached",
        "generated",
        "joined",
        "output",
        "preempted",
        "prompt",
        "shard",
        "ticket",
    )

    def __init__(self, arrival: float, prompt: int, output: int) -> None:
        self.arrival = arrival
        self.prompt = prompt
        self.output = output
        self.generated = 0
        self.cached = 0
        self.joined = 0
        self.shard = 0
        self.ticket = 0
        self.preempted = -1.0


_TICKETS = count(1)


class Lane:
    """The decoding requests of one batch.

    A request that joins at lane step s with c cached tokens needs a new block at every step t with
    ``(c + t - s) % block_size == 0``: `_growth` counts the requests by that phase, so a step's demand is one look-up.
    """

    def __init__(self, pools: list[BlockPool]) -> None:
        self._pools = pools
        self._block_size = pools[0].block_size
        self.step = 0
        self.sequences = [0] * len(pools)
        self.cached_tokens = [0] * len(pools)
        self._growth = [[0] * self._block_size for _ in pools]
        self._finishing: list[tuple[int, int, Request]] = []
        self._order: list[tuple[int, Request]] = []

    def __len__(self) -> int:
        return sum(self.sequences)

    def join(self, request: Request) -> None:
        """Add a request whose `cached` tokens already have their blocks; its next token comes from this step."""
        shard = request.shard
        request.joined = self.step
        request.ticket = next(_TICKETS)
        self.sequences[shard] += 1
        self.cached_tokens[shard] += request.cached
        self._growth[shard][(self.step - request.cached) % self._block_size] += 1
        last_step = self.step + request.output - request.generated - 1
        heappush(self._finishing, (last_step, request.ticket, request))
        self._order.append((request.ticket, request))

    def grow(self) -> list[Request]:
        """Take the blocks that this step's new tokens need; return the requests preempted to make room.

        As in vLLM, the request that joined last gives way first, and loses all its blocks.
        """
        preempted: list[Request] = []
        for shard, pool in enumerate(self._pools):
            while (need := self._growth[shard][self.step % self._block_size]) > pool.free:
                preempted.append(self._preempt_last(shard))
            pool.free -= need
            self.cached_tokens[shard] += self.sequences[shard]
        return preempted

    def finish_step(self) -> list[Request]:
        """End the step: every request has one token more; return those that are complete."""
        finished: list[Request] = []
        while self._finishing and self._finishing[0][0] <= self.step:
            _, ticket, request = heappop(self._finishing)
            if request.ticket == ticket:
                request.generated = request.output
                self._leave(request, self.step + 1)
                finished.append(request)
        self.step += 1
        if len(self._order) > 2 * len(self) + 64:
            self._order = [entry for entry in self._order if entry[1].ticket == entry[0]]
        return finished

    def preempt_shard(self, shard: int) -> list[Request]:
        """Take all requests of a shard out, whose KV is lost."""
        lost = []
        while self.sequences[shard]:
            lost.append(self._preempt_last(shard))
        return lost

    def _preempt_last(self, shard: int) -> Request:
        for index in range(len(self._order) - 1, -1, -1):
            ticket, request = self._order[index]
            if request.ticket == ticket and request.shard == shard:
                del self._order[index]
                request.generated += self.step - request.joined
                self._leave(request, self.step)
                return request
        raise AssertionError("blocks are missing in a lane without requests")

    def _leave(self, request: Request, step: int) -> None:
        shard, held = request.shard, request.cached + step - request.joined
        request.ticket = 0
        self._pools[shard].free += self._pools[shard].blocks(held)
        self.sequences[shard] -= 1
        self.cached_tokens[shard] -= held
        self._growth[shard][(request.joined - request.cached) % self._block_size] -= 1
