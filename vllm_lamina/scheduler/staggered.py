"""vLLM's scheduler, shown one lane at a time, so that two disjoint batches are in flight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_lamina.compat.outputs import reported_times
from vllm_lamina.compat.scheduled import lane_of, mark_lane
from vllm_lamina.config import ALWAYS, LaminaConfig
from vllm_lamina.scheduler.costs import MARGIN, StepCosts
from vllm_lamina.scheduler.lanes import Lanes, request_load
from vllm_lamina.scheduler.placement import PlacingScheduler


class StaggeredScheduler(PlacingScheduler):
    """Schedules one lane's requests a step, and admits waiting requests to the lane that has room for them.

    Where two halves would take longer than one batch, by what the steps so far have cost, there is one lane.

    Everything else (token budget, priorities, prefix cache, preemption) is vLLM's, applied to the lane's requests.
    """

    running: list[Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._admitted: int | None = None
        super().__init__(*args, **kwargs)
        # The other lane's step may still write a finished request's blocks: vLLM then frees them when it is over.
        self.defer_block_free = True
        self.lanes = Lanes(self.vllm_config.max_concurrent_batches)
        self.costs = StepCosts()
        options = LaminaConfig.from_additional_config(self.vllm_config.additional_config)
        self._always = options.stagger == ALWAYS
        self._num_lanes = 1
        """Lanes in use; the others are being emptied, or empty."""
        self._share_of_load, self._share_of_requests = 0.0, 0.0
        self._load_of_others = 0
        self._adapters: set[int] = set()
        """LoRA adapters that the model worker must hold, of both lanes, while a lane is scheduled."""

    @property
    def max_num_active_reqs(self) -> int:
        """How many requests vLLM's scheduler may have running, asked before each admission.

        While a lane is scheduled this is the number it has as soon as it holds its share, so that admission ends.
        """
        if self._admitted is None:
            return self._max_num_active_reqs
        if self._lane_has_its_share():
            return 0
        return self._admitted

    @max_num_active_reqs.setter
    def max_num_active_reqs(self, value: int) -> None:
        self._max_num_active_reqs = value

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule the idle lane that waited longest. The output carries its index as ``lamina_lane``."""
        self.recover_if_due()
        loads = {request.request_id: request_load(request.num_tokens) for request in self.running}
        self.lanes.keep_only(loads)
        self._choose_num_lanes()
        if self._num_lanes == 1:
            self.lanes.gather()
        else:
            self.lanes.spread(loads)
        index = None if self.recovery_is_due else self.lanes.next_idle(self._useful_lanes())
        with self._showing(index):
            output = super().schedule(throttle_prefills)
        mark_lane(output, index)
        if output.total_num_scheduled_tokens:
            assert index is not None
            scheduled = output.num_scheduled_tokens
            self.lanes.begin_step(index, scheduled, _adapters(self.requests[name] for name in scheduled))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Take the output of a lane's step; the lane is idle from now on."""
        if scheduler_output.total_num_scheduled_tokens:
            self.lanes.end_step(lane_of(scheduler_output))
            self._learn(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Reset the prefix cache; what the model worker's input batches hold is unknown afterwards."""
        for lane in self.lanes.lanes:
            lane.previous.clear()
        return bool(super().reset_prefix_cache(*args, **kwargs))

    def _forget_batch(self, names: Iterable[str]) -> None:
        for lane in self.lanes.lanes:
            lane.previous.difference_update(names)

    @property
    def batches_in_flight(self) -> int:
        """Lanes that have running requests."""
        running = {request.request_id for request in self.running}
        return sum(not lane.members.isdisjoint(running) for lane in self.lanes.lanes)

    def _learn(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> None:
        times = reported_times(model_runner_output)
        scheduled = scheduler_output.num_scheduled_tokens
        if times is None or len(scheduled) != scheduler_output.total_num_scheduled_tokens:
            return  # a step that prefills says little about those that decode
        running = (self.requests.get(request_id) for request_id in scheduled)
        self.costs.observe(len(scheduled), sum(r.num_tokens for r in running if r is not None), times)

    def _choose_num_lanes(self) -> None:
        expected = [*self.running, *self._next_to_run()]
        if len(expected) < 2 or not (self._always or self.costs.known):
            self._num_lanes = 1
            return
        if self._always:
            self._num_lanes = len(self.lanes.lanes)
            return
        gain = self.costs.gain_of_two(len(expected), sum(request.num_tokens for request in expected))
        if gain > 1 + MARGIN:
            self._num_lanes = len(self.lanes.lanes)
        elif gain < 1 - MARGIN:
            self._num_lanes = 1

    def _useful_lanes(self) -> Iterator[int]:
        """Lanes with something to do. An empty lane is useful only if a waiting request could enter it."""
        admits = self._anything_waits() and len(self.running) < self._max_num_active_reqs
        for index, lane in enumerate(self.lanes.lanes):
            if lane.members or (admits and index < self._num_lanes):
                yield index

    def _anything_waits(self) -> bool:
        return bool(self.waiting or self.kv_holding_waiting)

    @contextmanager
    def _showing(self, index: int | None) -> Iterator[None]:
        """Let vLLM's scheduler see the requests of one lane only, or of none; afterwards it sees all again."""
        everyone = self.running
        members = self.lanes.lanes[index].members if index is not None else set()
        shown = [request for request in everyone if request.request_id in members]
        hidden = [request for request in everyone if request.request_id not in members]
        # vLLM's per-step memory of which requests the model worker's input batch holds is a memory per lane.
        self.prev_step_scheduled_req_ids = self.lanes.lanes[index].previous if index is not None else set()
        self._admitted = self._max_num_active_reqs - len(hidden) if index is not None else 0
        self._share_of_load, self._share_of_requests = self._shares()
        self._load_of_others = sum(request_load(request.num_tokens) for request in hidden)
        self._adapters = _adapters(everyone).union(*(lane.adapters for lane in self.lanes.lanes))
        self.running = shown
        try:
            yield
        finally:
            self._admitted = None
            place = {request.request_id: position for position, request in enumerate(everyone)}
            last = len(everyone)
            if index is not None:
                for request in self.running:
                    self.lanes.assign(request.request_id, index)
            self.running = sorted(hidden + self.running, key=lambda r: place.get(r.request_id, last))

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may be scheduled; vLLM asks before each admission.

        vLLM admits no more than ``max_loras`` adapters to a step. Here that bounds both lanes together, and with them
        the requests that ended while their step was in flight: an adapter that such a step uses must keep its slot.
        """
        if not super()._handle_blocked_waiting_request(request):
            return False
        adapters = self._adapters | _adapters([request])
        if self.lora_config is not None and len(adapters) > self.lora_config.max_loras:
            return False
        self._adapters = adapters
        return True

    def _shares(self) -> tuple[float, float]:
        """Load and number of requests of which each lane should hold its part: of those that can run at once."""
        expected = [*self.running, *self._next_to_run()]
        load = sum(request_load(request.num_tokens) for request in expected)
        return load / self._num_lanes, len(expected) / self._num_lanes

    def _next_to_run(self) -> Iterator[Request]:
        """Waiting requests that may run soon beside the others, if they share blocks as much as those do."""
        room = self._max_num_active_reqs - len(self.running)
        free_blocks = self.kv_cache_manager.block_pool.get_num_free_blocks()
        tokens = free_blocks * self.block_size
        used = (self._num_usable_blocks() - free_blocks) * self.block_size
        held = sum(request.num_tokens for request in self.running)
        unshared = min(1.0, used / held) if held else 1.0
        for request in chain(self.kv_holding_waiting, self.waiting):
            room -= 1
            tokens -= unshared * request.num_tokens
            if room < 0 or tokens < 0:
                return
            yield request

    def _lane_has_its_share(self) -> bool:
        if self._num_lanes == 1:
            return False
        load = sum(request_load(request.num_tokens) for request in self.running)
        if load <= self._load_of_others:
            return False  # whatever is still admitted, the lighter lane may take
        return load >= self._share_of_load or len(self.running) >= self._share_of_requests


def _adapters(requests: Iterable[Request]) -> set[int]:
    """The LoRA adapters of the requests."""
    return {request.lora_request.lora_int_id for request in requests if request.lora_request is not None}
