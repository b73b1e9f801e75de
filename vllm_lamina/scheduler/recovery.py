"""vLLM's scheduler, which takes back steps that failed with a lost attention worker, and recomputes what that held."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_lamina.compat.config import recovery_of
from vllm_lamina.compat.failed_requests import end_with_errors
from vllm_lamina.compat.free_blocks import all_blocks, blocks_by_request, forget_cached
from vllm_lamina.compat.outputs import has_failed
from vllm_lamina.config import LaminaConfig
from vllm_lamina.metrics.engine import EngineMetrics

logger = init_logger("vllm.lamina")


class Recovery(Protocol):
    """What the scheduler asks of the executor; see `executor.recovery`."""

    @property
    def may_rejoin(self) -> bool: ...
    def recover(self) -> Any: ...


class RecoveringScheduler(Scheduler):
    """Requests outlive the attention workers that hold their KV blocks.

    A step that failed is taken back: its requests stand where they stood before it. When no step is in flight, the
    executor gets the lost workers back or replaced. Requests that held blocks of a lost worker are then preempted, so
    that vLLM recomputes them from their tokens; those blocks leave the prefix cache. The other requests go on.

    A failed step leaves blocks behind that vLLM took for filled when it scheduled the step, and that other requests may
    have hit as a cached prefix since. They leave the prefix cache too, and who relies on them is recomputed; the output
    of a step that read them is not believed.

    While a worker is down there are fewer blocks. A request of more tokens than they hold waits for the worker as long
    as a recovery may take, and then ends with an error.
    """

    running: list[Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine_metrics = EngineMetrics()
        self._recovery: Recovery | None = recovery_of(self.vllm_config)
        self._writing: deque[dict[str, dict[int, int]]] = deque()
        """Of each step in flight, in order, and each request: the blocks it writes, and the first slot of each."""
        self._unwritten: dict[int, int] = {}
        """The same of steps that failed, until the recovery."""
        self._failed = False
        self._incomplete_since: float | None = None
        """When the engine began to go on without some of its attention workers."""
        options = LaminaConfig.from_additional_config(self.vllm_config.additional_config)
        self._recovery_timeout = options.recovery_timeout
        self._blocks = blocks_by_request(self.kv_cache_manager)

    @property
    def recovery_is_due(self) -> bool:
        """Nothing may be scheduled before a recovery, which waits until no step is in flight."""
        return self._failed or (self._recovery is not None and self._recovery.may_rejoin)

    def recover_if_due(self) -> None:
        """Recover, if that is due and no step is in flight."""
        if self.recovery_is_due and not self._writing:
            self._recover()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule as vLLM does, after a recovery where one is due."""
        self.recover_if_due()
        output = super().schedule(throttle_prefills)
        if output.total_num_scheduled_tokens:
            self._writing.append(self._blocks_written(output))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Take the output of a step, but for the requests whose part of it failed."""
        if scheduler_output.total_num_scheduled_tokens:
            written = self._writing.popleft()
            scheduled = scheduler_output.num_scheduled_tokens
            if has_failed(model_runner_output):
                self._failed = True
                lost = list(scheduled)
            else:
                lost = [name for name in scheduled if self._unwritten and self._relies_on_unwritten(name)]
            if lost:
                for name in lost:
                    self._unwritten = written[name] | self._unwritten  # an earlier step's slot comes first
                    self._take_back(name, scheduled[name])
                rest = {name: tokens for name, tokens in scheduled.items() if name not in lost}
                scheduler_output = dataclasses.replace(scheduler_output, num_scheduled_tokens=rest)
        self._end_what_waits_too_long()
        return super().update_from_output(scheduler_output, model_runner_output)

    def _end_what_waits_too_long(self) -> None:
        """End the requests that do not fit the blocks that are left, if those have been few for too long."""
        since = self._incomplete_since
        if since is None or time.monotonic() - since < self._recovery_timeout:
            return
        usable = self._num_usable_blocks()
        too_large = [
            name
            for name, request in self.requests.items()
            if self._needed_blocks(request) > usable and not request.is_finished()
        ]
        end_with_errors(self, too_large)
        for name in too_large:
            logger.error(
                "Lamina: request %s ends with an error: its %d tokens need %d KV blocks, and %d are left without %s, "
                "for more than %g s (--lamina-recovery-timeout).",
                name,
                self.requests[name].num_tokens,
                self._needed_blocks(self.requests[name]),
                usable,
                ", ".join(sorted(self.engine_metrics.recovery.lost_workers)),
                self._recovery_timeout,
            )

    def _needed_blocks(self, request: Request) -> int:
        blocks: int = -(-request.num_tokens // self.block_size)
        return blocks

    def _blocks_written(self, output: SchedulerOutput) -> dict[str, dict[int, int]]:
        written = {}
        for name, num_tokens in output.num_scheduled_tokens.items():
            end = self.requests[name].num_computed_tokens
            begin = end - num_tokens
            blocks = self._blocks[name]
            written[name] = {
                blocks[index].block_id: max(0, begin - index * self.block_size)
                for index in range(begin // self.block_size, -(-end // self.block_size))
            }
        return written

    def _take_back(self, name: str, num_tokens: int) -> None:
        request = self.requests.get(name)
        if request is None or request.is_finished():
            return
        request.num_in_flight_tokens -= num_tokens
        if request.num_stale_output_tokens > 0:  # preempted since
            request.num_stale_output_tokens -= num_tokens
            return
        request.num_computed_tokens -= num_tokens
        request.is_prefill_chunk = request.num_computed_tokens < request.num_tokens

    def _relies_on_unwritten(self, name: str) -> bool:
        request = self.requests.get(name)
        return request is not None and any(
            index * self.block_size + self._unwritten[block.block_id] < request.num_computed_tokens
            for index, block in enumerate(self._blocks.get(name, ()))
            if block.block_id in self._unwritten
        )

    def _recover(self) -> None:
        assert self._recovery is not None
        recovered = self._recovery.recover()
        lost_blocks = self._blocks_of_workers(recovered.lost)
        victims = [
            request
            for request in self.running
            if self._relies_on_unwritten(request.request_id)
            or any(block.block_id in lost_blocks for block in self._blocks.get(request.request_id, ()))
        ]
        num_tokens = sum(request.num_computed_tokens for request in victims)
        self._preempt(victims)
        forget_cached(self.kv_cache_manager, lost_blocks | self._unwritten.keys())
        self._unwritten.clear()
        self._failed = False
        self._go_on_without(recovered.down)
        if not recovered.down:
            self._incomplete_since = None
        elif self._incomplete_since is None:
            self._incomplete_since = time.monotonic()
        counters = self.engine_metrics.recovery
        counters.recoveries += 1
        counters.requests_recomputed += len(victims)
        counters.tokens_recomputed += num_tokens
        counters.lost_workers = set(recovered.addresses_down)
        logger.info(
            "Lamina: recovery took %.2f s; %d of %d running requests are recomputed, %d tokens.",
            recovered.seconds,
            len(victims),
            len(victims) + len(self.running),
            num_tokens,
        )

    def _preempt(self, requests: list[Request]) -> None:
        names = {request.request_id for request in requests}
        self.running = [request for request in self.running if request.request_id not in names]
        now = time.monotonic()
        # In reverse, for each goes to the head of the queue.
        for request in reversed(requests):
            self._preempt_request(request, now, drop_stale_output=True)
        self._forget_batch(names)

    def _forget_batch(self, names: Iterable[str]) -> None:
        """The model worker's input batch holds nothing of these requests that is still right."""
        self.prev_step_scheduled_req_ids.difference_update(names)

    def _blocks_of_workers(self, workers: Iterable[int]) -> set[int]:
        """Ids of the blocks of which these workers hold a part."""
        return set(range(self.kv_cache_manager.block_pool.num_gpu_blocks)) if workers else set()

    def _go_on_without(self, workers: Iterable[int]) -> None:
        """Hand out no block of these workers until told otherwise."""

    def _num_usable_blocks(self) -> int:
        """Blocks that requests may get from the workers that are there."""
        return len(all_blocks(self.kv_cache_manager))
