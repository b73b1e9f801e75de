"""Who comes before whom, over both lanes: what vLLM promises of one batch, checked at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_lamina.scheduler.scheduler import LaminaScheduler

Urgency = tuple[int, float]


class UrgencyCheck:
    """Watches a scheduler: whom it preempts for want of blocks, whom it admits, and how long its prompts' parts are."""

    def __init__(self, scheduler: LaminaScheduler) -> None:
        self._scheduler = scheduler
        self._by_priority = scheduler.scheduler_config.policy == "priority"
        self._block_size = scheduler.kv_blocks.block_size
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
        self.waited_for_steps += len(set(scheduler._short) - was_short)
        running = [request.request_id for request in scheduler.running]
        assert len(running) == len(set(running))
        self._check_admission([request for request in scheduler.running if request.request_id not in before])
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
        passed = [r for r in scheduler.waiting if self.urgency(r) < last and scheduler._has_slot(r)]
        homes = {scheduler.lanes.home(r.request_id) for r in passed}
        assert homes.isdisjoint({None, scheduler._lane}), "a request has overtaken a more urgent one"
        lacking = sum(-(-request.num_tokens // self._block_size) for request in passed)
        assert lacking <= scheduler.kv_blocks.num_free, "a request has taken the blocks of a more urgent one"
        assert len(passed) <= scheduler.num_admissible, "a request has taken the place of a more urgent one"

    def _check_long_prompts(self, output: SchedulerOutput, num_eligible: int) -> None:
        config = self._scheduler.scheduler_config
        assert output.total_num_scheduled_tokens <= config.max_num_batched_tokens
        if (threshold := config.long_prefill_token_threshold) and num_eligible > 1:
            assert max(output.num_scheduled_tokens.values(), default=0) <= threshold
