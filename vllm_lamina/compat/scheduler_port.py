"""vLLM's scheduler, by the operations that Lamina's is made of: all that is known here of its inside."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import chain, takewhile
from typing import Any, Protocol

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_lamina.compat.config import facts_of, lanes_share_requests
from vllm_lamina.compat.kv_blocks import KVBlocks, Span
from vllm_lamina.compat.stat_loggers import attach_stats
from vllm_lamina.compat.states import keep_apart
from vllm_lamina.compat.step_lane import mark_lane
from vllm_lamina.config import LaminaConfig


class Admission(Protocol):
    """Which waiting requests a lane admits."""

    def home(self, name: str) -> int | None:
        """The lane that a request runs in or not at all; None where any will do."""

    def is_full(self, index: int, tokens: Sequence[int], next_tokens: int) -> bool:
        """Whether a lane admits no new request, by the tokens of each that it has and of the one that is next."""


class SchedulerPort(Scheduler):
    """vLLM's scheduler, which can schedule some of its running requests alone, and take back what it scheduled.

    Requests go by their ids, here their names. Tokens of a request are those of its prompt and output.

    Attributes
    ----------
    num_batches
        Batches that the engine keeps in flight.
    max_running
        Requests that may run at a time.
    kv_blocks
        The KV blocks, and who holds them.
    requests_may_move
        Whether a request may run in any lane.
    engine_facts
        What the executor says of the engine.
    lamina_config
        The user's options.
    """

    running: list[Request]
    processed_step_seq: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._hidden: list[Request] = []
        """Running requests that vLLM's scheduler does not see now: those of other lanes than the one at hand."""
        self._lane: int | None = None
        """The lane that is being scheduled."""
        self._is_short = False
        """A request of it lacks blocks that nobody can give before a step in flight is over."""
        self._short: dict[str, int] = {}
        """Each request that lacks such blocks, and how many tokens it needs blocks for."""
        self._in_batch: defaultdict[int, set[str]] = defaultdict(set)
        """Of each lane: the requests that its input batch on the model worker holds as vLLM's scheduler knows them."""
        super().__init__(*args, **kwargs)
        self.num_batches: int = self.vllm_config.max_concurrent_batches
        # Another batch's step may still write a finished request's blocks: vLLM then frees them when it is over.
        self.defer_block_free = self.num_batches > 1
        self.engine_facts = facts_of(self.vllm_config)
        keep_apart(self.kv_cache_manager, self.engine_facts.state_blocks)
        self.kv_blocks = KVBlocks(self.kv_cache_manager)
        self.kv_blocks.share(self._reserved_from, self._preempt_in_other_lane)
        self.requests_may_move = lanes_share_requests(self.vllm_config)
        self.lamina_config = LaminaConfig.from_additional_config(self.vllm_config.additional_config)
        self._admission: Admission
        self._admits = True
        """Whether a step may admit waiting requests: not where a running one has just lacked blocks."""
        self._adapters_in_use: set[int] = set()
        """LoRA adapters that the model worker must hold while a lane is scheduled."""
        self._num_passed = self._blocks_of_passed = 0
        """Waiting requests of another lane that this one has passed over, and the blocks that they lack."""

    @property
    def known(self) -> Container[str]:
        """Every request that is not gone."""
        requests: dict[str, Request] = self.requests
        return requests

    def running_names(self) -> list[str]:
        """The running requests, in vLLM's order."""
        return [request.request_id for request in self.running]

    def paused_names(self) -> list[str]:
        """Sessions between two inputs, which keep their blocks meanwhile."""
        return [request.request_id for request in self.kv_holding_waiting]

    def running_tokens(self) -> dict[str, int]:
        """Tokens of each running request, in the same order."""
        return {request.request_id: request.num_tokens for request in self.running}

    def waiting_tokens(self) -> Iterator[int]:
        """Tokens of each request that waits to run, in the order in which they will be admitted."""
        return (request.num_tokens for request in self._waiting_to_run())

    def _waiting_to_run(self) -> Iterator[Request]:
        """The waiting requests but for sessions that wait for their next input."""
        waiting = chain(self.kv_holding_waiting, self.waiting)
        return (request for request in waiting if request.status != RequestStatus.WAITING_FOR_STREAMING_REQ)

    def unfinished_tokens(self) -> dict[str, int]:
        """Tokens of each request that has not ended."""
        return {name: r.num_tokens for name, r in self.requests.items() if not r.is_finished()}

    def tokens_of(self, name: str) -> int:
        """Tokens of a request; 0 where it is gone."""
        request = self.requests.get(name)
        return 0 if request is None else request.num_tokens

    def computed(self, name: str) -> Span:
        """The tokens [begin, end) of a request that count as computed, and the blocks that hold them.

        Those of steps in flight count. There are none where the request is gone.
        """
        request = self.requests.get(name)
        end = 0 if request is None else request.num_computed_tokens
        return 0, end, self.kv_blocks.of_tokens(name, 0, end)

    def computed_by(self, scheduled: Mapping[str, int]) -> dict[str, Span]:
        """The same of the tokens that a step computes which was just scheduled, by its `scheduled_tokens`."""
        requests, blocks_of_tokens = self.requests, self.kv_blocks.of_tokens
        computed = {}
        for name, num_tokens in scheduled.items():
            end = requests[name].num_computed_tokens  # vLLM has counted the step's
            begin = end - num_tokens
            computed[name] = begin, end, blocks_of_tokens(name, begin, end)
        return computed

    def adapters_of(self, names: Iterable[str]) -> set[int]:
        """The LoRA adapters of these requests."""
        if self.lora_config is None:
            return set()
        return _adapters(self.requests[name] for name in names)

    @property
    def num_admissible(self) -> int:
        """How many more requests may run; a session that waits for input keeps its place."""
        num_paused: int = self.num_waiting_for_streaming_input
        return self.max_running - len(self.running) - num_paused

    def next_to_admit(self, adapters_in_flight: set[int]) -> str | None:
        """The request that is to be admitted next; None where none may be."""
        if self.num_admissible <= 0:
            return None
        self._note_adapters(adapters_in_flight)
        return next((r.request_id for r in self._waiting_to_run() if self._has_slot(r)), None)

    def schedule_lane(
        self,
        lane: int | None,
        members: Set[str],
        throttle_prefills: bool,
        *,
        admission: Admission,
        adapters_in_flight: set[int],
    ) -> SchedulerOutput:
        """Schedule a step of one lane: of the running requests that it has, and of waiting ones that it admits.

        Parameters
        ----------
        lane
            Its index, which the output carries (`lane_of`); None for a step without tokens, which vLLM may need too.
        members
            The lane's requests. vLLM's scheduler sees no other running request meanwhile.
        admission
            Asked before each admission.
        adapters_in_flight
            LoRA adapters that steps in flight use, whatever became of their requests.
        """
        # vLLM's per-step memory of what the model worker's input batch holds is a memory per lane.
        self.prev_step_scheduled_req_ids = self._in_batch[lane] if lane is not None else set()
        self._note_adapters(adapters_in_flight)
        self._lane, self._admission = lane, admission
        self._num_passed = self._blocks_of_passed = 0
        self._short = {name: tokens for name, tokens in self._short.items() if name not in members}
        self._admits, self._is_short = True, False
        with self._hiding_all_but(members):
            output = super().schedule(throttle_prefills)
        mark_lane(output, lane)
        return output

    @contextmanager
    def _hiding_all_but(self, members: Set[str]) -> Iterator[None]:
        """Let vLLM's scheduler see these running requests only; afterwards it sees all again, in their order.

        First come, first served, that is the order of arrival, whichever lane admitted them first: the last one is the
        first that vLLM preempts.
        """
        place = {request.request_id: position for position, request in enumerate(self.running)}
        self._hidden = [request for request in self.running if request.request_id not in members]
        if self._hidden:
            self.running = [request for request in self.running if request.request_id in members]
        try:
            yield
        finally:
            self._is_short = False
            by_arrival, last = self.policy == SchedulingPolicy.FCFS, len(place)
            self.running = sorted(
                self._hidden + self.running,
                key=lambda r: (r.arrival_time if by_arrival else 0.0, place.get(r.request_id, last)),
            )
            self._hidden = []

    def get_request_counts(self) -> tuple[int, int]:
        """Running and waiting requests: those of other lanes count against a long prompt of this one too."""
        running, waiting = super().get_request_counts()
        return running + len(self._hidden), waiting

    def _least_urgent(self) -> Request:
        """Of the running requests of all lanes the one that vLLM's policy preempts first."""
        by_priority = self.policy == SchedulingPolicy.PRIORITY
        return max(
            chain(self.running, self._hidden),
            key=lambda request: (request.priority if by_priority else 0, request.arrival_time),
        )

    def _reserved_from(self, request: Request) -> int:
        """Blocks that a request may not take, for those that run in other lanes need them for their next step.

        One that is admitted comes after all that run. One that runs need not care: who lacks blocks preempts.
        """
        if request.status == RequestStatus.RUNNING:
            return 0
        longest = self.max_num_scheduled_tokens
        return sum(
            self.kv_blocks.lacking(
                other.request_id,
                other.num_computed_tokens
                + min(longest, max(1, other.num_tokens - other.num_computed_tokens)),
            )
            for other in self._hidden
        )

    def _preempt_in_other_lane(self, request: Request, num_tokens: int) -> bool:
        """Preempt the least urgent request, if it is one of another lane, for one of this lane that lacks blocks.

        It needs blocks for so many of its tokens. False where it has to do without, or vLLM's scheduler preempts one
        that it sees. The least urgent request may be in flight: then its step may still write its blocks, and its token
        is to count. Nobody more urgent is preempted in its place: the request at hand waits until that step is over.
        """
        if request.status != RequestStatus.RUNNING:
            return False  # one that waits takes nothing from those that run
        victim = self._least_urgent()
        if victim not in self._hidden:
            return False
        self._admits = False
        if not self._request_blocks_can_be_freed(victim):
            self._is_short = True
            self._short[request.request_id] = num_tokens
            return False
        self._hidden.remove(victim)
        self._preempt_request(victim, time.monotonic())
        return True

    def _request_blocks_can_be_freed(self, request: Request) -> bool:
        """Whether a request's blocks are free as soon as it is preempted; vLLM preempts nobody else then."""
        return not self._is_short and bool(super()._request_blocks_can_be_freed(request))

    def preempt_for_short(self) -> None:
        """Preempt for the requests that waited for a step in flight, where it is over; before a step is scheduled."""
        for name, num_tokens in list(self._short.items()):
            request = self.requests.get(name)
            if request is None or request.status != RequestStatus.RUNNING:
                del self._short[name]
                continue
            while self.kv_blocks.lacking(name, num_tokens) > self.kv_blocks.num_free:
                victim = self._least_urgent()
                if victim is request or not self._request_blocks_can_be_freed(victim):
                    break  # it preempts itself in its turn; or it waits on
                self.running.remove(victim)
                self._preempt_request(victim, time.monotonic())

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """Let a request wait, first come, first served: those that came before may wait too, for their lane."""
        super()._preempt_request(request, timestamp, drop_stale_output)
        self._short.pop(request.request_id, None)
        for batch in self._in_batch.values():
            batch.discard(request.request_id)
        if self.policy == SchedulingPolicy.FCFS:
            self.waiting.remove_request(request)
            before = takewhile(lambda other: other.arrival_time < request.arrival_time, self.waiting)
            self.waiting.insert(sum(1 for _ in before), request)

    @property
    def max_num_active_reqs(self) -> int:
        """How many requests vLLM's scheduler may have running, of those that it sees; it asks before each admission.

        Requests that were passed over, for they run in another lane, keep their place and the blocks that they lack:
        nobody that comes after them may take these.
        """
        if self._lane is None or not self._admits:
            return 0
        request = (self.kv_holding_waiting or self.waiting).peek_request()
        if self._num_passed:
            lacking = self._blocks_of_passed + self._blocks_lacking(request)
            if lacking > self.kv_blocks.num_admissible:
                return 0
        if self._admission.home(request.request_id) is None and self._admission.is_full(
            self._lane, [r.num_tokens for r in self.running], request.num_tokens
        ):
            return 0
        return self.max_running - len(self._hidden) - self._num_passed

    @max_num_active_reqs.setter
    def max_num_active_reqs(self, value: int) -> None:
        self.max_running = value

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What vLLM's scheduler says: which inputs a step encodes, and how many tokens it computes.

        Where an input's tokens see each other whole, none in a step that would end within it. vLLM's own does not begin
        one that it cannot finish, but goes on with one whose beginning was in the prefix cache, or that comes first.
        """
        scheduled = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
        )
        if self.vllm_config.model_config.is_mm_prefix_lm:
            end = num_computed_tokens + scheduled[1]
            places = (feature.mm_position for feature in request.mm_features)
            if any(place.offset < end < place.offset + place.length for place in places):
                return [], 0, encoder_compute_budget, [], []
        return scheduled

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may be scheduled; vLLM asks before each admission, and passes over the others.

        vLLM admits no more than ``max_loras`` adapters to a step. Here that bounds all lanes together, and with them
        the requests that ended while their step was in flight: an adapter that such a step uses must keep its slot.
        """
        if not super()._handle_blocked_waiting_request(request) or not self._has_slot(request):
            return False
        if self.lora_config is not None:
            self._adapters_in_use |= _adapters([request])
        if self._admission.home(request.request_id) in (None, self._lane):
            if request.num_computed_tokens and not self.kv_blocks.of(request.request_id):
                request.num_computed_tokens = 0  # its blocks were lost, see `preempt`
            return True
        self._num_passed += 1
        self._blocks_of_passed += self._blocks_lacking(request)
        return False

    def _blocks_lacking(self, request: Request) -> int:
        """KV blocks that a waiting request needs to run, if it finds nothing in the prefix cache."""
        return self.kv_blocks.lacking_to_run(request.request_id, request.num_tokens)

    def _note_adapters(self, in_flight: set[int]) -> None:
        if self.lora_config is not None:
            self._adapters_in_use = _adapters(self.running) | in_flight

    def _has_slot(self, request: Request) -> bool:
        """Whether there is a slot for the adapter of a request, if it has one."""
        return (
            self.lora_config is None
            or len(self._adapters_in_use | _adapters([request])) <= self.lora_config.max_loras
        )

    def take_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput, lost: Collection[str]
    ) -> Any:
        """Let vLLM take the output of a step, but for the requests whose part is lost: it takes their step back."""
        if lost:
            scheduled = scheduler_output.num_scheduled_tokens
            for name in lost:
                self._take_back(name, scheduled[name])
            rest = {name: tokens for name, tokens in scheduled.items() if name not in lost}
            scheduler_output = dataclasses.replace(scheduler_output, num_scheduled_tokens=rest)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _take_back(self, name: str, num_tokens: int) -> None:
        """Let a request stand where it stood before a step of so many tokens."""
        request = self.requests.get(name)
        if request is None or request.is_finished():
            return
        request.num_in_flight_tokens -= num_tokens
        if request.num_stale_output_tokens > 0:  # preempted since
            request.num_stale_output_tokens -= num_tokens
            return
        request.num_computed_tokens -= num_tokens
        request.is_prefill_chunk = request.num_computed_tokens < request.num_tokens

    def preempt(self, names: Collection[str]) -> None:
        """Let these running requests wait, ahead of others, and be computed anew; paused sessions with their next.

        What a step in flight samples for them counts when it comes, and they wait for it. A session's does not, and is
        sampled anew: if it were the last one before the next input, vLLM would forget the context as not computed. So
        that of a paused one counts as computed until it is admitted.
        """
        for request in self.kv_holding_waiting:
            if request.request_id in names:
                self.kv_cache_manager.free(request)
        preempted = [request for request in self.running if request.request_id in names]
        self.running = [request for request in self.running if request.request_id not in names]
        now = time.monotonic()
        # In reverse, for each goes to the head of the queue.
        for request in reversed(preempted):
            self._preempt_request(request, now, drop_stale_output=request.resumable)

    def end_with_error(self, name: str) -> None:
        """Let the next `take_output` end this request, and tell its client, as one that cannot be scheduled."""
        self.encoder_cache_mismatch_reqs.add(name)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Reset the prefix cache; blocks that steps in flight may write are free only once these are over."""
        if reset_running_requests:
            self.preempt(self.running_names())
        if self.deferred_frees:
            self.engine_facts.finish_steps()
            num_processed = self.processed_step_seq
            self.processed_step_seq = self.sched_step_seq
            self._drain_deferred_frees()
            self.processed_step_seq = num_processed  # their outputs are still to come
        return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))

    def carry(self, stats: Any, take: Callable[[], dict[str, Any]]) -> Any:
        """Let vLLM's statistics of a step, if there are any, carry what ``take`` returns to front ends that log it."""
        if stats is not None and self.engine_facts.logs_stats:
            attach_stats(stats, take())
        return stats


def scheduled_tokens(output: SchedulerOutput) -> dict[str, int]:
    """How many tokens of which requests a step computes."""
    scheduled: dict[str, int] = output.num_scheduled_tokens
    return scheduled


def _adapters(requests: Iterable[Request]) -> set[int]:
    return {request.lora_request.lora_int_id for request in requests if request.lora_request is not None}
