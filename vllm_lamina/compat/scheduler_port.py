"""vLLM's scheduler, by the operations that Lamina's is made of: all that is known here of its inside."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_lamina.compat.config import facts_of, lanes_share_requests
from vllm_lamina.compat.kv_blocks import KVBlocks
from vllm_lamina.compat.stat_loggers import attach_stats
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._num_hidden = 0
        self._lane: int | None = None
        """The lane that is being scheduled."""
        super().__init__(*args, **kwargs)
        self.num_batches: int = self.vllm_config.max_concurrent_batches
        # Another batch's step may still write a finished request's blocks: vLLM then frees them when it is over.
        self.defer_block_free = self.num_batches > 1
        self.kv_blocks = KVBlocks(self.kv_cache_manager, self.block_size)
        self.requests_may_move = lanes_share_requests(self.vllm_config)
        self.engine_facts = facts_of(self.vllm_config)
        self.lamina_config = LaminaConfig.from_additional_config(self.vllm_config.additional_config)
        self._in_batch: defaultdict[int, set[str]] = defaultdict(set)
        """Of each lane: the requests that its input batch on the model worker holds as vLLM's scheduler knows them."""
        self._admission: Admission
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

    def computed(self, name: str) -> tuple[int, int, list[int]]:
        """The tokens [begin, end) of a request that count as computed, and the ids of the blocks that hold them.

        Those of steps in flight count. There are none where the request is gone.
        """
        request = self.requests.get(name)
        end = 0 if request is None else request.num_computed_tokens
        return 0, end, self.kv_blocks.of_tokens(name, 0, end)

    def computed_by(self, scheduled: Mapping[str, int]) -> dict[str, tuple[int, int, list[int]]]:
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
        with self._hiding_all_but(members):
            output = super().schedule(throttle_prefills)
        mark_lane(output, lane)
        return output

    @contextmanager
    def _hiding_all_but(self, members: Set[str]) -> Iterator[None]:
        """Let vLLM's scheduler see these running requests only; afterwards it sees all again, in their order."""
        everyone = self.running
        hidden = [request for request in everyone if request.request_id not in members]
        if hidden:
            self.running = [request for request in everyone if request.request_id in members]
        self._num_hidden = len(hidden)
        try:
            yield
        finally:
            self._num_hidden = 0
            if hidden:
                place = {request.request_id: position for position, request in enumerate(everyone)}
                last = len(everyone)
                self.running = sorted(hidden + self.running, key=lambda r: place.get(r.request_id, last))

    @property
    def max_num_active_reqs(self) -> int:
        """How many requests vLLM's scheduler may have running, of those that it sees; it asks before each admission.

        Requests that were passed over, for they run in another lane, keep their place and the blocks that they lack:
        nobody that comes after them may take these.
        """
        if self._lane is None:
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
        return self.max_running - self._num_hidden - self._num_passed

    @max_num_active_reqs.setter
    def max_num_active_reqs(self, value: int) -> None:
        self.max_running = value

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
            return True
        self._num_passed += 1
        self._blocks_of_passed += self._blocks_lacking(request)
        return False

    def _blocks_lacking(self, request: Request) -> int:
        """KV blocks that a waiting request needs to run, if it finds nothing in the prefix cache."""
        needed: int = -(-request.num_tokens // self.kv_blocks.block_size)
        return max(0, needed - len(self.kv_blocks.of(request.request_id)))

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
        """Let these running requests wait, ahead of others, and be computed anew."""
        preempted = [request for request in self.running if request.request_id in names]
        self.running = [request for request in self.running if request.request_id not in names]
        now = time.monotonic()
        # In reverse, for each goes to the head of the queue.
        for request in reversed(preempted):
            self._preempt_request(request, now, drop_stale_output=True)
        for batch in self._in_batch.values():
            batch.difference_update(names)

    def end_with_error(self, name: str) -> None:
        """Let the next `take_output` end this request, and tell its client, as one that cannot be scheduled."""
        self.encoder_cache_mismatch_reqs.add(name)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Reset the prefix cache; what the model worker's input batches hold is unknown afterwards."""
        self._in_batch.clear()
        return bool(super().reset_prefix_cache(*args, **kwargs))

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
