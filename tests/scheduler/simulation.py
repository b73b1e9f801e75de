"""The engine's loop around a real scheduler, with a model worker that answers random tokens, and checks every step."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import gcd, lcm
from typing import Any
from unittest.mock import patch

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_lamina.compat.config import facts_of, with_batches_in_flight
from vllm_lamina.compat.outputs import StepTimes, has_failed, report_times
from vllm_lamina.compat.step_lane import lane_of
from vllm_lamina.scheduler.scheduler import LaminaScheduler

BLOCK_SIZE = 32
VOCAB_SIZE = 1000


def full(block_size: int = BLOCK_SIZE) -> AttentionSpec:
    return FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.float32)


def window(num_tokens: int, block_size: int = BLOCK_SIZE) -> AttentionSpec:
    return SlidingWindowSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=32,
        dtype=torch.float32,
        sliding_window=num_tokens,
    )


def chunks(num_tokens: int) -> AttentionSpec:
    return ChunkedLocalAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=1,
        head_size=32,
        dtype=torch.float32,
        attention_chunk_size=num_tokens,
    )


Groups = tuple[AttentionSpec, ...]
"""What each group of layers keeps."""

FULL: Groups = (full(),)
WINDOW: Groups = (window(40),)
WINDOWS_AND_FULL: Groups = (window(40), window(40), full())
BLOCKS_OF_TWO_SIZES: Groups = (window(40, 2 * BLOCK_SIZE), full())
CHUNKS_AND_FULL: Groups = (chunks(2 * BLOCK_SIZE), full())

SEVERAL: dict[str, Groups] = {
    "window": WINDOW,
    "windows and full": WINDOWS_AND_FULL,
    "blocks of two sizes": BLOCKS_OF_TWO_SIZES,
    "chunks and full": CHUNKS_AND_FULL,
}


def first_seen(group: AttentionSpec, position: int) -> int:
    """The first token that one at this position attends in the layers of a group."""
    match group:
        case SlidingWindowSpec():
            return max(0, position - group.sliding_window + 1)
        case ChunkedLocalAttentionSpec():
            return position // group.attention_chunk_size * group.attention_chunk_size
    return 0


MAX_NUM_SEQS = 12


def make_config(model: str, num_batches: int = 2, **options: Any) -> VllmConfig:
    """Of an engine with so many small batches in flight."""
    arguments: dict[str, Any] = {
        "max_model_len": 1024,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": 160,
        "enforce_eager": True,
        "executor": "lamina",
        "lamina_stagger": "always",
    }
    return with_batches_in_flight(
        EngineArgs(model, **arguments | options).create_engine_config(), num_batches
    )


def make_scheduler(
    config: VllmConfig,
    num_blocks: int,
    placement: tuple[str, list[int]] | None = None,
    may_move: bool = False,
    groups: Groups = FULL,
) -> LaminaScheduler:
    """A scheduler of so many blocks; ``placement`` is what a model worker says of several attention workers.

    It is that of vLLM's V2 model runner where requests may move from lane to lane.
    """
    facts_of(config).block_placement = placement
    kv_cache_config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec([f"layer.{i}"], group) for i, group in enumerate(groups)],
    )
    block_sizes = [group.block_size for group in groups]
    config.cache_config.num_gpu_blocks = num_blocks
    config.cache_config.block_size = BLOCK_SIZE
    with patch.object(VllmConfig, "use_v2_model_runner", may_move):
        return LaminaScheduler(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=lcm(*block_sizes),
            hash_block_size=gcd(*block_sizes),
            log_stats=True,
        )


Urgency = tuple[int, float]


class UrgencyCheck:
    """Who comes before whom over both lanes, and how long parts of prompts are: what vLLM promises of one batch."""

    def __init__(self, scheduler: LaminaScheduler) -> None:
        self._scheduler = scheduler
        self._by_priority = scheduler.scheduler_config.policy == "priority"
        self._for_blocks = True
        self.preempted_in_other_lane = 0
        self.waited_for_steps = 0
        """Times that a request had to wait for a step in flight, whose requests it could not preempt."""
        preempt, preempt_request = scheduler.preempt, scheduler._preempt_request

        def preempt_for_another_reason(*args: Any) -> None:
            self._for_blocks = False
            preempt(*args)
            self._for_blocks = True

        def preempt_and_check(request: Request, *args: Any, **kwargs: Any) -> None:
            if self._for_blocks:
                self._check_preemption(request)
            preempt_request(request, *args, **kwargs)

        scheduler.preempt = preempt_for_another_reason  # type: ignore[method-assign]
        scheduler._preempt_request = preempt_and_check  # type: ignore[method-assign]

    def schedule(self) -> SchedulerOutput:
        """Schedule a step, and check it."""
        scheduler = self._scheduler
        # vLLM admits those that hold blocks, sessions with new input, before all others.
        before = {request.request_id for request in (*scheduler.running, *scheduler.kv_holding_waiting)}
        num_eligible = sum(scheduler.get_request_counts())
        was_short = set(scheduler._short)
        output: SchedulerOutput = scheduler.schedule()
        waits = set(scheduler._short) - was_short
        self.waited_for_steps += len(waits)
        running = [request.request_id for request in scheduler.running]
        assert len(running) == len(set(running))
        admitted = [request for request in scheduler.running if request.request_id not in before]
        assert not (waits and admitted), "a request was admitted where one that runs lacks blocks"
        self._check_admission(admitted)
        self._check_long_prompts(output, num_eligible)
        if not self._by_priority:
            arrivals = [request.arrival_time for request in scheduler.running]
            assert arrivals == sorted(arrivals), "the last that runs is not the one that came last"
        return output

    def urgency(self, request: Request) -> Urgency:
        """Smaller is more urgent."""
        return request.priority if self._by_priority else 0, request.arrival_time

    def _check_preemption(self, victim: Request) -> None:
        scheduler = self._scheduler
        others = (r for r in scheduler.requests.values() if r.status == RequestStatus.RUNNING)
        assert all(self.urgency(other) <= self.urgency(victim) for other in others), (
            "a request goes on that is less urgent than one that is preempted"
        )
        assert victim.num_in_flight_tokens == 0, "the token of a step in flight would be lost"
        self.preempted_in_other_lane += scheduler.lanes.home(victim.request_id) not in (None, scheduler._lane)

    def _check_admission(self, admitted: Sequence[Request]) -> None:
        """Who waits is behind those that were admitted, or waits for its own lane, with blocks and a place for it."""
        scheduler = self._scheduler
        if not admitted:
            return
        last = max(map(self.urgency, admitted))
        # vLLM 0.33 lets others pass a request whose inputs find no room.
        waiting = (r for r in scheduler.waiting if not r.mm_features)
        passed = [r for r in waiting if self.urgency(r) < last and scheduler._has_slot(r)]
        homes = {scheduler.lanes.home(r.request_id) for r in passed}
        assert homes.isdisjoint({None, scheduler._lane}), "a request has overtaken a more urgent one"
        lacking = sum(scheduler.kv_blocks.needed(request.num_tokens) for request in passed)
        assert lacking <= scheduler.kv_blocks.num_free, "a request has taken the blocks of a more urgent one"
        assert len(passed) <= scheduler.num_admissible, "a request has taken the place of a more urgent one"

    def _check_long_prompts(self, output: SchedulerOutput, num_eligible: int) -> None:
        config = self._scheduler.scheduler_config
        assert output.total_num_scheduled_tokens <= config.max_num_batched_tokens
        if (threshold := config.long_prefill_token_threshold) and num_eligible > 1:
            assert max(output.num_scheduled_tokens.values(), default=0) <= threshold


@dataclass
class Part:
    """Tokens [begin, end) of a request in one group of layers, with all blocks that it has there."""

    begin: int
    end: int
    first_seen: int
    """The first token that these attend."""
    block_size: int
    blocks: list[int]

    def blocks_from(self, position: int) -> list[int]:
        """Those of the tokens from this position on."""
        return self.blocks[position // self.block_size : -(-self.end // self.block_size)]

    def slots_from(self, position: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Each token from this position on, with its block and the slot in it."""
        for token in range(position, self.end):
            yield token, (self.blocks[token // self.block_size], token % self.block_size)


@dataclass
class InFlight:
    """A step whose output has not been taken."""

    output: SchedulerOutput
    used: set[int]
    """Blocks that it may still read or write."""
    samples: set[str]
    """Requests of which it computes all tokens, so that it samples the next one."""
    answer: ModelRunnerOutput | None = None
    """What the model worker says, once it is over."""


@dataclass
class Simulation:
    """Drives a scheduler as vLLM's ``EngineCore.step_with_batch_queue`` does, or ``step`` for one batch in flight."""

    scheduler: LaminaScheduler
    seed: int
    queue: deque[InFlight] = field(default_factory=deque)
    finished: dict[str, int] = field(default_factory=dict)
    errors: set[str] = field(default_factory=set)
    """Of those that finished: the ones whose clients got an error."""
    aborted: set[str] = field(default_factory=set)
    lane_of: dict[str, int] = field(default_factory=dict)
    """The lane of a request's last step."""
    moves: int = 0
    preemptions: int = 0
    overlapping_steps: int = 0
    times: Callable[[int, int], StepTimes] = lambda requests, context: StepTimes(1.0, 0.01 * context)
    """Seconds of a step by its requests and their context tokens."""

    urgency: UrgencyCheck = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        init_none_hash(sha256)
        self._shared_prefix = [self.random.randrange(VOCAB_SIZE) for _ in range(4 * BLOCK_SIZE)]
        self._requests: dict[str, Request] = {}
        if self.scheduler is not None:
            self.watch(self.scheduler)

    def watch(self, scheduler: LaminaScheduler) -> None:
        """Drive this scheduler."""
        self.scheduler = scheduler
        self.urgency = UrgencyCheck(scheduler)
        self.groups = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
        self._hasher = get_request_block_hasher(scheduler.hash_block_size, sha256)
        scheduler.engine_facts.finish_steps = self.finish_steps

    def add(
        self,
        prompt_len: int,
        max_tokens: int,
        priority: int = 0,
        shared_prefix: bool = False,
        adapter: int | None = None,
        session: str | None = None,
        resumable: bool = False,
    ) -> str:
        """Queue a request of random tokens, perhaps behind a prefix that others have too, or with a LoRA adapter.

        One that is resumable is a session, which waits for more input when it has given its tokens; ``session`` is one
        that has this as its next input.
        """
        prompt = [self.random.randrange(VOCAB_SIZE) for _ in range(prompt_len)]
        request = Request(
            request_id=session or f"r{len(self._requests)}",
            prompt_token_ids=self._shared_prefix + prompt if shared_prefix else prompt,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
            priority=priority,
            arrival_time=float(len(self._requests)),
            block_hasher=self._hasher,
            lora_request=LoRARequest(f"adapter-{adapter}", adapter, "nowhere") if adapter else None,
            resumable=resumable,
        )
        if session is None:
            self._requests[request.request_id] = request
        self.finished.pop(request.request_id, None)
        self.scheduler.add_request(request)
        return request.request_id

    def abort(self, request_id: str) -> None:
        """The client leaves, whatever the request is doing."""
        if request_id not in self.finished:
            self.aborted.add(request_id)
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def reset(self, running_too: bool = True) -> None:
        """Reset the prefix cache, whatever is in flight; it fails where a request runs and is to go on."""
        runs = bool(self.scheduler.running)
        assert self.scheduler.reset_prefix_cache(reset_running_requests=running_too) == (
            running_too or not runs
        )

    def unfinished(self) -> list[str]:
        """Requests that somebody still waits for."""
        return [r for r in self._requests if r not in self.finished and r not in self.aborted]

    def step(self) -> None:
        """Schedule until all batches are in flight or nothing can be scheduled, then answer the oldest."""
        self.schedule()
        if self.queue:
            self.answer()

    def schedule(self) -> None:
        """Schedule until all batches are in flight or nothing can be scheduled."""
        while len(self.queue) < self.scheduler.num_batches and self.scheduler.has_requests():
            output = self.urgency.schedule()
            self.queue.append(self._check(output))

    def run_until(self, condition: Callable[[], object]) -> None:
        """In a bounded number of steps."""
        steps = 0
        while not condition():
            self.step()
            steps += 1
            assert steps < 20_000, f"no progress: {self.unfinished()}"

    def finish(self) -> None:
        """Let all requests end, and what they left in flight."""
        self.run_until(lambda: not self.unfinished())
        self.run_until(lambda: not self.queue and not self.scheduler.has_finished_requests())

    def _check(self, output: SchedulerOutput) -> InFlight:
        scheduler, config = self.scheduler, self.scheduler.scheduler_config
        in_flight = {r for step in self.queue for r in step.output.num_scheduled_tokens}
        assert not in_flight & set(output.num_scheduled_tokens), "a request is in two batches in flight"
        assert len(scheduler.running) <= config.max_num_seqs
        for one, other in zip(scheduler.lanes.lanes, scheduler.lanes.lanes[1:], strict=False):
            assert not one.members & other.members, "a request is in two lanes"
        self._check_adapters([*(step.output for step in self.queue), output])
        self._check_lane(output)
        self._check_lacking()
        written: Counter[int] = Counter()
        used: set[int] = set()
        for request_id, count in output.num_scheduled_tokens.items():
            # `schedule` has already counted the step's tokens as computed.
            end = scheduler.requests[request_id].num_computed_tokens
            for part in self.parts_of(request_id, end - count, end):
                written.update(part.blocks_from(part.begin))
                used.update(part.blocks_from(part.first_seen))
        assert max(written.values(), default=1) == 1, "a block is written for two requests"
        blocks = scheduler.kv_cache_manager.block_pool.blocks
        for block in used:
            assert not blocks[block].is_null, "a block is used that was given back"
            assert blocks[block].ref_cnt > 0, "a block is used that is free"
        for step in self.queue:
            assert step.used.isdisjoint(written), "a block is written that a step in flight uses"
        if self.queue and self.queue[0].output.num_scheduled_tokens and output.num_scheduled_tokens:
            self.overlapping_steps += 1
        samples = {
            name
            for name in output.num_scheduled_tokens
            if scheduler.requests[name].num_computed_tokens >= scheduler.requests[name].num_tokens
        }
        return InFlight(output, used, samples)

    def _check_lane(self, output: SchedulerOutput) -> None:
        """Where requests may not move, every step of a request's life is in one lane."""
        for request_id in output.num_scheduled_tokens:
            lane = lane_of(output)
            self.moves += self.lane_of.get(request_id, lane) != lane
            self.lane_of[request_id] = lane
        assert self.scheduler.requests_may_move or not self.moves, "a request has changed lanes"

    def _check_adapters(self, in_flight: list[SchedulerOutput]) -> None:
        """The model worker has room for the adapters of all steps in flight, whatever became of their requests."""
        lora = self.scheduler.lora_config
        if lora is not None:
            requests = [self._requests[r] for output in in_flight for r in output.num_scheduled_tokens]
            adapters = {
                r.lora_request.lora_int_id for r in requests + self.scheduler.running if r.lora_request
            }
            assert len(adapters) <= lora.max_loras, "more adapters are in use than the model worker holds"

    def _check_lacking(self) -> None:
        """Counted as vLLM counts."""
        scheduler = self.scheduler
        manager = scheduler.kv_cache_manager
        for request in (*scheduler.running, *islice(scheduler.waiting, 2)):
            name, num_tokens = request.request_id, request.num_tokens
            for counted, capped in (
                (scheduler.kv_blocks.lacking(name, num_tokens), False),
                (scheduler.kv_blocks.lacking_to_run(name, num_tokens), True),
            ):
                assert counted == manager.coordinator.get_num_blocks_to_allocate(
                    request_id=name,
                    num_tokens=num_tokens,
                    new_computed_blocks=manager.empty_kv_cache_blocks.blocks,
                    num_encoder_tokens=0,
                    total_computed_tokens=request.num_computed_tokens,
                    num_local_computed_tokens=request.num_computed_tokens,
                    num_tokens_main_model=num_tokens,
                    apply_admission_cap=capped,
                )

    def parts_of(self, request_id: str, begin: int, end: int) -> list[Part]:
        """What tokens [begin, end) of a request are in each group."""
        by_group = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        return [
            Part(begin, end, first_seen(group, begin), group.block_size, list(blocks))
            for group, blocks in zip(self.groups, by_group, strict=True)
        ]

    def finish_steps(self) -> None:
        """The steps in flight are over before their outputs are taken."""
        for step in self.queue:
            if step.answer is None and step.output.num_scheduled_tokens:
                step.answer = self._model_output(step)
            step.used.clear()

    def answer(self) -> None:
        """Answer the oldest step in flight."""
        step = self.queue.popleft()
        output = step.output
        self.preemptions = sum(request.num_preemptions for request in self._requests.values())
        if not output.num_scheduled_tokens:
            answer = EMPTY_MODEL_RUNNER_OUTPUT
        else:
            request_ids = list(output.num_scheduled_tokens)
            answer = step.answer or self._model_output(step)
            if not has_failed(answer):
                report_times(answer, self.times(len(request_ids), self._context(request_ids)))
        for outputs in self.scheduler.update_from_output(output, answer).values():
            for request_output in outputs.outputs:
                if request_output.finish_reason is not None:
                    request = self._requests[request_output.request_id]
                    self.finished[request_output.request_id] = request.num_output_tokens
                    if request_output.finish_reason == FinishReason.ERROR:
                        self.errors.add(request_output.request_id)

    def _model_output(self, step: InFlight) -> ModelRunnerOutput:
        request_ids = list(step.output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
            sampled_token_ids=[
                [self.random.randrange(VOCAB_SIZE)] if name in step.samples else [] for name in request_ids
            ],
        )

    def _context(self, request_ids: list[str]) -> int:
        requests = (self.scheduler.requests.get(request_id) for request_id in request_ids)
        return sum(request.num_tokens for request in requests if request is not None)
