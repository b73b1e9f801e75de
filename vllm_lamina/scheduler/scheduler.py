"""The scheduler of an engine whose attention workers may be lost: one batch in flight, or two staggered ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from vllm_lamina.compat.outputs import has_failed, reported_times
from vllm_lamina.compat.scheduler_port import SchedulerPort, scheduled_tokens
from vllm_lamina.compat.step_lane import lane_of
from vllm_lamina.config import ALWAYS
from vllm_lamina.metrics.engine import EngineMetrics
from vllm_lamina.scheduler.lanes import Lanes
from vllm_lamina.scheduler.ledger import StepLedger
from vllm_lamina.scheduler.placement import BlockPlacement, PlacedBlocks, SharedBlocks

logger = logging.getLogger("vllm.lamina")


class LaminaScheduler(SchedulerPort):
    """vLLM's scheduler, applied to one lane's requests a step.

    Token budget, priorities, prefix cache and preemption are vLLM's. Waiting requests enter the lane that has room for
    them, and get their KV blocks where the partition wants them. With one batch in flight one lane has all requests.

    Requests outlive the attention workers that hold their KV blocks. A step that failed is taken back: its requests
    stand where they stood before it. When no step is in flight, the executor gets the lost workers back or replaced.
    Requests that held blocks of a lost worker, or rely on what was not written, are then preempted, so that vLLM
    recomputes them from their tokens, and so are those whose states a failed step may have moved on; those blocks leave
    the prefix cache. The other requests go on.

    While a worker is down there are fewer blocks. A request of more tokens than they hold waits for the worker as long
    as a recovery may take, and then ends with an error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine_metrics = EngineMetrics()
        self.lanes = Lanes(
            self.num_batches,
            may_move=self.requests_may_move,
            always=self.lamina_config.stagger == ALWAYS,
        )
        self.ledger = StepLedger()
        self.placement = self._place_blocks()
        self._incomplete_since: float | None = None
        """When the engine began to go on without some of its attention workers."""

    def _place_blocks(self) -> BlockPlacement:
        blocks = self.kv_blocks
        if self.engine_facts.block_placement is None:
            return SharedBlocks(blocks.ids, len(blocks.usable), lambda: blocks.usage)
        kind, blocks_per_worker = self.engine_facts.block_placement
        placed = PlacedBlocks(kind, blocks.usable, blocks_per_worker)
        blocks.take_from(placed, placed.serve)
        return placed

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """Schedule the idle lane that waited longest, after a recovery where one is due."""
        if self._recovery_is_due and not self.ledger.in_flight:
            self._recover()
        self.preempt_for_short()
        running = self.running_tokens()
        self.lanes.plan(running, self._next_to_run(running), self.known)
        adapters_in_flight = self.lanes.adapters_in_flight()
        lane = None
        if not self._recovery_is_due:
            lane = self.lanes.next_idle(self.next_to_admit(adapters_in_flight))
        output = self.schedule_lane(
            lane,
            self.lanes.members(lane),
            throttle_prefills,
            admission=self.lanes,
            adapters_in_flight=adapters_in_flight,
        )
        scheduled = scheduled_tokens(output)
        if scheduled:
            assert lane is not None
            self.lanes.begin_step(lane, scheduled, self.adapters_of(scheduled))
            self.ledger.begin(self.computed_by(scheduled))
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take the output of a lane's step, but for the requests whose part of it is lost; the lane is idle then."""
        times = reported_times(model_runner_output)
        self.engine_metrics.observe(times)
        lost: list[str] = []
        if scheduled := scheduled_tokens(scheduler_output):
            self.lanes.end_step(lane_of(scheduler_output))
            if times is not None:
                self.lanes.learn(scheduled, self.tokens_of, times)
            lost = self.ledger.end(has_failed(model_runner_output), self.computed)
        self._end_what_waits_too_long()
        return self.take_output(scheduler_output, model_runner_output, lost)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Reset the prefix cache, that of attention workers which are down included: nobody has blocks of theirs."""
        with self.placement.with_all_workers():
            return super().reset_prefix_cache(*args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics of a step, with Lamina's in them."""
        return self.carry(super().make_stats(*args, **kwargs), self._take_metrics)

    def _next_to_run(self, running: Mapping[str, int]) -> Iterator[int]:
        """Tokens of waiting requests that may run soon beside the others, if they share blocks as much as those do."""
        room, needed = self.num_admissible, self.kv_blocks.needed
        waiting = list(islice(self.waiting_tokens(), max(0, room)))
        if not waiting:
            return  # as in most steps
        free: float = self.kv_blocks.num_free
        used = self.placement.num_usable_blocks - free
        held = sum(map(needed, running.values()))
        unshared = min(1.0, used / held) if held else 1.0
        for tokens in waiting:
            free -= unshared * needed(tokens)
            if free < 0:
                return
            yield tokens

    @property
    def _recovery_is_due(self) -> bool:
        """Nothing may be scheduled before a recovery, which waits until no step is in flight."""
        recovery = self.engine_facts.recovery
        return self.ledger.failed or (recovery is not None and recovery.may_rejoin)

    def _recover(self) -> None:
        recovered = self.engine_facts.recovery.recover()
        lost_blocks = self.placement.blocks_of(recovered.lost)
        running = [*self.running_names(), *self.paused_names()]
        victims: dict[str, int] = {}
        for name in running:
            _, num_computed, _ = held = self.computed(name)
            # A step moves its states on in place, layer by layer: nobody knows where one that failed has left them.
            if (
                (self.kv_blocks.has_states and name in self.ledger.lost)
                or self.ledger.relies_on_unwritten(held)
                or not lost_blocks.isdisjoint(self.kv_blocks.of(name))
            ):
                victims[name] = num_computed
        self.preempt(victims)
        self.kv_blocks.forget_cached(lost_blocks | self.ledger.unwritten)
        self.ledger.clear()
        self.placement.go_on_without(recovered.down)
        if not recovered.down:
            self._incomplete_since = None
        elif self._incomplete_since is None:
            self._incomplete_since = time.monotonic()
        counters = self.engine_metrics.recovery
        counters.recoveries += 1
        counters.requests_recomputed += len(victims)
        counters.tokens_recomputed += sum(victims.values())
        counters.lost_workers = set(recovered.addresses_down)
        logger.info(
            "Lamina: recovery took %.2f s; %d of %d running requests are recomputed, %d tokens.",
            recovered.seconds,
            len(victims),
            len(running),
            sum(victims.values()),
        )

    def _end_what_waits_too_long(self) -> None:
        """End the requests that do not fit the blocks that are left, if those have been few for too long."""
        since, timeout = self._incomplete_since, self.lamina_config.recovery_timeout
        if since is None or time.monotonic() - since < timeout:
            return
        usable = self.placement.num_usable_blocks
        for name, tokens in self.unfinished_tokens().items():
            needed = self.kv_blocks.needed(tokens)
            if needed <= usable:
                continue
            self.end_with_error(name)
            logger.error(
                "Lamina: request %s ends with an error: its %d tokens need %d KV blocks, and %d are left without %s, "
                "for more than %g s (--lamina-recovery-timeout).",
                name,
                tokens,
                needed,
                usable,
                ", ".join(sorted(self.engine_metrics.recovery.lost_workers)),
                timeout,
            )

    def _take_metrics(self) -> dict[str, Any]:
        workers: list[str] = []
        usages: list[float] = []
        for rank in self.engine_facts.attention_workers:
            workers += rank
            usages += map(self.placement.usage_of, range(len(rank)))
        return self.engine_metrics.take(workers, usages, self.lanes.num_busy(self.running_names()))
