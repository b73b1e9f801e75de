"""Runs a request trace through a deployment, event by event: continuous batching, block accounting, staggered lanes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count
from math import ceil

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.deployment import Deployment
from vllm_lamina.planner.models import Reach
from vllm_lamina.planner.results import Recorder, SimulationResult
from vllm_lamina.planner.traces import Trace

WATERMARK = 0.01
"""Fraction of the KV blocks that admission leaves free, so that running requests can grow."""


@dataclass(frozen=True)
class EngineOptions:
    """How the engine schedules.

    Attributes
    ----------
    prefill
        Whether prompts are computed here (chunked, together with decoding), or, as in the paper's evaluation,
        elsewhere: a request then arrives with the KV of its prompt, and recomputing after preemption is free too.
    max_sequences
        Requests in flight at most; None leaves it to memory.
    token_budget
        Prompt and output tokens of one step at most, when prefill is computed here.
    block_size
        Tokens of a KV block.
    recompute
        Whether requests that lost their KV recompute it here even if prompts are computed elsewhere.
    """

    prefill: bool = False
    max_sequences: int | None = None
    token_budget: int = 8192
    block_size: int = 16
    recompute: bool = False


@dataclass(frozen=True)
class Failure:
    """A worker that fails and is replaced.

    Attributes
    ----------
    time
        When, in seconds.
    downtime
        Seconds until its replacement runs.
    shards
        Shards of the KV cache that are lost, whose requests are admitted again; none if a model worker failed.
    """

    time: float
    downtime: float
    shards: tuple[int, ...] = ()


def simulate(
    deployment: Deployment,
    trace: Trace,
    options: EngineOptions | None = None,
    failures: Sequence[Failure] = (),
) -> SimulationResult:
    """Serve all requests of a trace.

    A lane's step takes as long as its own stages one after the other, and longer if a shared stage (the model replicas,
    a shard of the attention pool, the wire) still has earlier steps' work to do: each is a first-in-first-out
    server, so no stage ever does more than one second of work per second.

    Raises
    ------
    ConfigError
        No request of the trace fits into the KV cache.
    """
    return _Engine(deployment, trace, options or EngineOptions(), failures).run()


@dataclass(slots=True)
class BlockPool:
    """Free KV blocks of one shard of the cache.

    A block is of the layers whose part of a request grows with it; of all layers, where each has a window.
    """

    total: int
    block_size: int
    free: int
    kept: Reach

    def blocks(self, tokens: int, length: int) -> int:
        """Blocks that a request occupies when it has so many tokens, of `length` in the end.

        Layers with a window have from the start what they have in the end.
        """
        grown = -(-tokens // self.block_size) if self.kept.growing else 0
        if not self.kept.windows:
            return grown
        return grown + ceil(float(self.kept.bounded(length)) / self.unit / self.block_size)

    @property
    def unit(self) -> float:
        """Tokens that all layers keep, in a token of a block."""
        return self.kept.growing or 1.0


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way.

    `cached` counts its tokens in the KV cache when it joined the lane; each step of the lane since then added one.
    `ticket` is unique to each joining and 0 while it waits; `preempted` is when it lost its blocks, or negative.
    """

    arrival: float
    prompt: int
    output: int
    generated: int = 0
    cached: int = 0
    joined: int = 0
    shard: int = 0
    ticket: int = 0
    preempted: float = -1.0

    @property
    def length(self) -> int:
        """Tokens in the end."""
        return self.prompt + self.output


_TICKETS = count(1)


class Lane:
    """The decoding requests of one batch.

    A request that joins at lane step s with c cached tokens needs a new block at every step t with
    ``(c + t - s) % block_size == 0``: `_growth` counts the requests by that phase, so a step's demand is one look-up.
    """

    def __init__(self, pools: list[BlockPool], read: Reach) -> None:
        self._pools = pools
        self._read = read
        self._block_size = pools[0].block_size
        self.step = 0
        self.sequences = [0] * len(pools)
        self.cached_tokens = [0.0] * len(pools)
        """Those that all layers see: fewer where some have a window."""
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
        self.cached_tokens[shard] += self._seen(request, request.cached)
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
            grows = pool.kept.growing > 0
            while (need := grows * self._growth[shard][self.step % self._block_size]) > pool.free:
                preempted.append(self._preempt_last(shard))
            pool.free -= need
            self.cached_tokens[shard] += self._read.growing * self.sequences[shard]
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
        self._pools[shard].free += self._pools[shard].blocks(held, request.length)
        self.sequences[shard] -= 1
        self.cached_tokens[shard] -= self._seen(request, held)
        self._growth[shard][(request.joined - request.cached) % self._block_size] -= 1

    def _seen(self, request: Request, tokens: int) -> float:
        seen = self._read.growing * tokens
        return seen + float(self._read.bounded(request.length)) if self._read.windows else seen


@dataclass(slots=True)
class _Step:
    """What a lane is doing until `end`."""

    start: float
    batch: int
    fresh: list[Request]
    prefilled: list[Request] = field(default_factory=list)
    end: float = 0.0
    model: float = 0.0
    attention: float = 0.0
    wire: float = 0.0


# Events that belong to no lane; failure i is _FAILURE - i.
_ARRIVAL, _WAKE, _FAILURE = -1, -2, -3


class _Engine:
    def __init__(
        self, deployment: Deployment, trace: Trace, options: EngineOptions, failures: Sequence[Failure]
    ) -> None:
        self.deployment, self.options = deployment, options
        self.failures = list(failures)
        size, model = options.block_size, deployment.model
        empty = BlockPool(0, size, 0, model.kept)
        total = int(deployment.shard_tokens / empty.unit) // size
        if total < 1:
            raise ConfigError(
                f"the KV cache holds {deployment.shard_tokens} tokens, less than one block of {size}"
            )
        self.pools = [replace(empty, total=total, free=total) for _ in range(deployment.shards)]
        self.reserve = int(WATERMARK * total)
        self.requests = self._accepted(trace)
        self.next_arrival = 0
        self.waiting: deque[Request] = deque()
        self.running = 0
        self.lanes = [Lane(self.pools, model.read) for _ in range(deployment.lanes)]
        self.joining: list[list[Request]] = [[] for _ in self.lanes]
        self.prefilling: list[deque[tuple[Request, int]]] = [deque() for _ in self.lanes]
        self.steps: list[_Step | None] = [None] * len(self.lanes)
        self.started = [False] * len(self.lanes)
        blocks = sum(pool.total for pool in self.pools)
        self.max_sequences = options.max_sequences or min(len(self.requests), blocks)
        stages = deployment.stages(
            self.max_sequences + (options.token_budget if options.prefill or options.recompute else 0)
        )
        self.model_time = stages.model.tolist()
        self.attention_time = stages.attention.tolist()
        self.wire_time = stages.wire.tolist()
        self.exposed_time = stages.exposed.tolist()
        self.hideable_time = stages.hideable.tolist()
        self.prompt_wire = stages.prompt_wire
        self.model_free = self.wire_free = 0.0
        self.shard_free = [0.0] * len(self.pools)
        self.shard_up = [0.0] * len(self.pools)
        self.lost_shards: list[list[int]] = [[] for _ in self.lanes]
        self.events: list[tuple[float, int]] = []
        self.recorder = Recorder(self.requests[0].arrival, len(trace) - len(self.requests))

    def _accepted(self, trace: Trace) -> list[Request]:
        pool = self.pools[0]
        accepted = [
            Request(arrival, prompt, output)
            for arrival, prompt, output in zip(
                trace.arrivals.tolist(), trace.prompts.tolist(), trace.outputs.tolist(), strict=True
            )
            if pool.blocks(prompt + output, prompt + output) <= pool.total - self.reserve
        ]
        if not accepted:
            raise ConfigError(
                f"no request of trace {trace.name!r} fits into the KV cache of {self.deployment.name}, which holds "
                f"{self.deployment.kv_tokens} tokens"
            )
        return accepted

    def run(self) -> SimulationResult:
        now = self.requests[0].arrival
        self._arrive(now)
        self._admit(now)
        # Lane i starts one model stage after lane i - 1 (on n - 1 replicas: t_m / (n - 1) apart).
        stagger = self.model_time[len(self.joining[0])] / self.deployment.replicas
        for index in range(len(self.lanes)):
            heappush(self.events, (now + index * stagger, index))
        for number, failure in enumerate(self.failures):
            heappush(self.events, (failure.time, _FAILURE - number))
        while self.events:
            now, index = heappop(self.events)
            if index < 0:
                if index == _ARRIVAL:
                    self._arrive(now)
                elif index <= _FAILURE:
                    self._fail(self.failures[_FAILURE - index], now)
                self._admit(now)
                self._wake(now)
                continue
            self.started[index] = True
            step = self.steps[index]
            if step is not None and step.end <= now:
                self._finish_step(index, step)
            self._admit(now)
            self._wake(now)
            if self.steps[index] is None:
                self._start_step(index, now)
        return self.recorder.result(self.deployment)

    def _arrive(self, now: float) -> None:
        requests = self.requests
        while self.next_arrival < len(requests) and requests[self.next_arrival].arrival <= now:
            self.waiting.append(requests[self.next_arrival])
            self.next_arrival += 1
        if self.next_arrival < len(requests):
            heappush(self.events, (requests[self.next_arrival].arrival, _ARRIVAL))

    def _admit(self, now: float) -> None:
        """Give waiting requests blocks, in order of arrival, and put each into the smallest lane."""
        while self.waiting and self.running < self.max_sequences:
            request = self.waiting[0]
            request.cached = request.prompt + request.generated
            up = [shard for shard, since in enumerate(self.shard_up) if since <= now]
            if not up:
                return
            request.shard = max(up, key=lambda shard: self.pools[shard].free)
            pool = self.pools[request.shard]
            need = pool.blocks(request.cached, request.length)
            if need > pool.free - self.reserve:
                return
            self.waiting.popleft()
            pool.free -= need
            self.running += 1
            if request.generated == 0:
                self.recorder.last_admission = now
            index = min(range(len(self.lanes)), key=self._load)
            if self.options.prefill or (self.options.recompute and request.preempted >= 0.0):
                self.prefilling[index].append((request, request.cached))
            else:
                self.joining[index].append(request)

    def _load(self, index: int) -> int:
        return len(self.lanes[index]) + len(self.joining[index]) + len(self.prefilling[index])

    def _wake(self, now: float) -> None:
        """Start idle lanes that were given requests; each waits for its staggered start first."""
        for index, step in enumerate(self.steps):
            if step is None and self.started[index] and (self.joining[index] or self.prefilling[index]):
                self._start_step(index, now)

    def _start_step(self, index: int, now: float) -> None:
        lane, fresh = self.lanes[index], self.joining[index]
        self.joining[index] = []
        for request in fresh:
            lane.join(request)
        for shard in self.lost_shards[index]:
            for request in lane.preempt_shard(shard):
                self._wait_again(request, now)
        self.lost_shards[index] = []
        for request in lane.grow():
            self._wait_again(request, now)
        step = _Step(now, len(lane), [request for request in fresh if request.ticket])
        chunk, prefill_time = self._take_prefill(index, step)
        if step.batch + chunk == 0:
            return
        per_shard = [
            cached * self.attention_time[sequences]
            for cached, sequences in zip(lane.cached_tokens, lane.sequences, strict=True)
        ]
        step.model = self.model_time[step.batch + chunk] + prefill_time
        slowest = max(per_shard)
        step.attention = sum(per_shard) / len(per_shard)
        step.wire = self.wire_time[step.batch] + chunk * self.prompt_wire
        hidden = min(slowest, self.hideable_time[step.batch])
        self.model_free = max(self.model_free, now) + step.model / self.deployment.replicas
        self.wire_free = max(self.wire_free, now) + step.wire
        end = now + step.model + slowest + self.exposed_time[step.batch] - hidden
        end = max(end, self.model_free, self.wire_free)
        for shard, work in enumerate(per_shard):
            self.shard_free[shard] = max(self.shard_free[shard], now) + work
            end = max(end, self.shard_free[shard])
        step.end = end
        self.steps[index] = step
        heappush(self.events, (end, index))

    def _wait_again(self, request: Request, now: float) -> None:
        """Put a request that lost its blocks at the head of the queue."""
        self.running -= 1
        self.recorder.preemptions += 1
        request.preempted = now
        self.waiting.appendleft(request)

    def _fail(self, failure: Failure, now: float) -> None:
        """Lose shards, each lane at the end of its step, or the time of one model replica, until they are replaced."""
        for shard in failure.shards:
            self.shard_up[shard] = now + failure.downtime
            for lost in self.lost_shards:
                lost.append(shard)
        if failure.shards:
            heappush(self.events, (now + failure.downtime, _WAKE))
        else:
            self.model_free = max(self.model_free, now) + failure.downtime / self.deployment.replicas

    def _take_prefill(self, index: int, step: _Step) -> tuple[int, float]:
        """Take prompt chunks up to the token budget; return their tokens and their attention's seconds."""
        queue, left, taken, seconds = self.prefilling[index], self.options.token_budget - step.batch, 0, 0.0
        while queue and left > 0:
            request, remaining = queue[0]
            part = min(remaining, left)
            context = request.cached - remaining
            seconds += self.deployment.compute.prefill_attention_time(part, context)
            left, taken = left - part, taken + part
            if part < remaining:
                queue[0] = (request, remaining - part)
            else:
                queue.popleft()
                step.prefilled.append(request)
        return taken, seconds

    def _finish_step(self, index: int, step: _Step) -> None:
        self.steps[index] = None
        late = sum(self._first_token(request, step.end) for request in step.fresh)
        tokens = step.batch + len(step.prefilled)
        self.recorder.step(
            step.start, step.end, step.batch, tokens, step.model, step.attention, step.wire, late
        )
        self.running -= len(self.lanes[index].finish_step())
        for request in step.prefilled:
            self._first_token(request, step.end)
            request.generated += 1
            if request.generated < request.output:
                self.joining[index].append(request)
            else:
                self.running -= 1
                pool = self.pools[request.shard]
                pool.free += pool.blocks(request.cached, request.length)

    def _first_token(self, request: Request, now: float) -> bool:
        """Record the wait for a first token, or for the next after preemption; return whether it was either."""
        if request.generated == 0:
            self.recorder.ttft.append(now - request.arrival)
            return True
        if request.preempted >= 0.0:
            self.recorder.time_between_tokens(now - request.preempted)
            request.preempted = -1.0
            return True
        return False
