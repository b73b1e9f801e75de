"""What Lamina's scheduler relies on in vLLM's, and that it reaches it through its port alone."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pickle
import re
import textwrap
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core import block_pool
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched import scheduler
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

import vllm_lamina.scheduler
from vllm_lamina.compat.config import facts_of, with_batches_in_flight
from vllm_lamina.compat.scheduler_port import SchedulerPort
from vllm_lamina.compat.step_lane import lane_of, mark_lane
from vllm_lamina.scheduler.scheduler import LaminaScheduler

OVERRIDDEN = {
    "__init__",
    "schedule",
    "update_from_output",
    "make_stats",
    "reset_prefix_cache",
    "max_num_active_reqs",
    "get_request_counts",
    "_handle_blocked_waiting_request",
    "_try_schedule_encoder_inputs",
    "_preempt_request",
    "_request_blocks_can_be_freed",
}
"""Methods of vLLM's scheduler that ours replace."""

SET = {"running", "prev_step_scheduled_req_ids", "defer_block_free", "processed_step_seq"}
"""Attributes of vLLM's scheduler that the port sets."""


def source_of(thing: object) -> str:
    return textwrap.dedent(inspect.getsource(thing))  # type: ignore[arg-type]


def attributes(cls: type, context: type[ast.expr_context]) -> set[str]:
    """Names that the class reads from ``self``, or sets there."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source_of(cls)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, context)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def names_of(cls: type) -> set[str]:
    """Methods of a class and attributes that its instances get from it."""
    return {name for name, value in vars(cls).items() if callable(value) or isinstance(value, property)} | (
        attributes(cls, ast.Store)
    )


VLLMS = set(dir(Scheduler)) | names_of(Scheduler) | names_of(SchedulerInterface)


def test_the_scheduler_imports_nothing_of_vllm() -> None:
    for path in Path(vllm_lamina.scheduler.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            assert not [m for m in modules if m.split(".")[0] == "vllm"], f"{path.name} imports {modules}"


def test_the_scheduler_uses_of_itself_what_it_or_its_port_defines() -> None:
    """What vLLM's scheduler has is reached through the port."""
    defined = (names_of(LaminaScheduler) | names_of(SchedulerPort)) - VLLMS
    assert attributes(LaminaScheduler, ast.Load) <= defined


def test_no_name_of_ours_is_one_of_vllms() -> None:
    """A name that a new vLLM takes too would change what its scheduler does, without an error."""
    ours = {name for cls in (SchedulerPort, LaminaScheduler) for name in names_of(cls)}
    assert {name for name in ours & VLLMS if not name.startswith("__")} == (OVERRIDDEN | SET) - {"__init__"}


def test_overridden_methods_are_called_as_they_were() -> None:
    """Relies on these parameters."""
    for name, parameters in {
        "schedule": ["self", "throttle_prefills"],
        "update_from_output": ["self", "scheduler_output", "model_runner_output"],
        "reset_prefix_cache": ["self", "reset_running_requests", "reset_connector"],
        "_handle_blocked_waiting_request": ["self", "request"],
        "_preempt_request": ["self", "request", "timestamp", "drop_stale_output"],
        "_request_blocks_can_be_freed": ["self", "request"],
        "_try_schedule_encoder_inputs": [
            "self",
            "request",
            "num_computed_tokens",
            "num_new_tokens",
            "encoder_compute_budget",
            "shift_computed_tokens",
        ],
        "get_request_counts": ["self"],
    }.items():
        assert [*inspect.signature(getattr(Scheduler, name)).parameters] == parameters, name


def test_running_requests_can_be_hidden_while_a_step_is_scheduled() -> None:
    """Relies on ``running`` being all that ``schedule`` knows of running requests, which it only shortens and to which
    it appends those that it admits, and on each of these computing some tokens in the step.
    """
    schedule = source_of(Scheduler.schedule)
    changes = set(re.findall(r"self\.running\.(\w+)\(|(del) self\.running|self\.running (=) ", schedule))
    assert {name for found in changes for name in found if name} == {"append", "pop", "del", "index"}
    _, _, admission = schedule.partition("self.running.append(request)")
    assert "num_scheduled_tokens[request_id] = num_new_tokens" in admission
    assert source_of(scheduler).count("self.running.append(") == 1


def test_admission_can_be_bounded() -> None:
    """Relies on ``max_num_active_reqs`` being read before each admission and nowhere else, when the next request is at
    the head of its queue, and on ``_handle_blocked_waiting_request`` being asked about each request.
    """
    source = source_of(scheduler)
    assert source.count("self.max_num_active_reqs") == 2, "it is set, and read once"
    assert "self.max_num_active_reqs = (" in source_of(Scheduler.__init__)
    _, _, loop = source_of(Scheduler.schedule).partition("while token_budget > 0:")
    bounded, peeked, asked, admitted = (
        loop.index(text)
        for text in (
            "if num_running >= self.max_num_active_reqs:",
            "request = request_queue.peek_request()",
            "self._handle_blocked_waiting_request(request)",
            "self.running.append(request)",
        )
    )
    assert bounded < peeked < asked < admitted
    assert "if not request_queue" in loop[:bounded]


def test_a_waiting_request_can_be_passed_over() -> None:
    """Relies on one that may not be scheduled being put back where it was, once the others had their chance."""
    for policy in (SchedulingPolicy.FCFS, SchedulingPolicy.PRIORITY):
        queue = create_request_queue(policy)
        requests = [Request(f"r{i}", [1], SamplingParams(), None, arrival_time=float(i)) for i in range(4)]
        for request in requests:
            queue.add_request(request)
        passed: deque[Request] = deque()
        passed.appendleft(queue.pop_request())
        passed.appendleft(queue.pop_request())
        queue.prepend_requests(passed)
        assert [queue.pop_request() for _ in requests] == requests
    loop = source_of(Scheduler.schedule)
    assert "step_skipped_waiting.appendleft(request_to_skip)" in loop
    assert "self.waiting.prepend_requests(step_skipped_waiting)" in loop


def test_sessions_that_wait_for_input_are_known() -> None:
    """Relies on their status, and on ``num_waiting_for_streaming_input``, which counts against what may run."""
    assert "self.num_waiting_for_streaming_input += 1" in source_of(Scheduler._handle_stopped_request)
    assert "RequestStatus.WAITING_FOR_STREAMING_REQ" in source_of(Scheduler._handle_stopped_request)
    assert "len(self.running) + self.num_waiting_for_streaming_input" in source_of(Scheduler.schedule)


def test_blocks_that_are_kept_from_waiting_requests_are_known() -> None:
    """Relies on ``KVCacheManager.watermark_blocks``."""
    assert "self.watermark_blocks = int(" in source_of(KVCacheManager.__init__)
    assert "watermark_blocks = self.watermark_blocks" in source_of(KVCacheManager.allocate_slots)


def test_waiting_requests_are_in_two_queues() -> None:
    """Relies on ``kv_holding_waiting`` being admitted before ``waiting``, and on there being no others."""
    loop = source_of(Scheduler.schedule)
    assert "request_queue = self.kv_holding_waiting" in loop
    assert "request_queue = self.waiting" in loop
    assert "len(self.waiting) + len(self.kv_holding_waiting)" in source_of(Scheduler.get_request_counts)


def test_the_memory_of_the_input_batch_can_be_exchanged() -> None:
    """Relies on ``prev_step_scheduled_req_ids`` being that memory, and a set that a step changes in place."""
    assert "self.prev_step_scheduled_req_ids" in source_of(Scheduler._make_cached_request_data)
    schedule = source_of(Scheduler.schedule)
    assert "self.prev_step_scheduled_req_ids.clear()" in schedule
    assert "self.prev_step_scheduled_req_ids.update(" in schedule
    assert "self.prev_step_scheduled_req_ids =" not in schedule


def test_blocks_of_ended_requests_wait_for_steps_in_flight() -> None:
    """Relies on ``defer_block_free``, read when a step is scheduled, ends, and when blocks are given back."""
    assert "self.defer_block_free" in source_of(Scheduler._request_blocks_can_be_freed)
    for method in (Scheduler.schedule, Scheduler.update_from_output):
        found = re.search(
            r"if self\.defer_block_free and (\w+\.)?total_num_scheduled_tokens > 0", source_of(method)
        )
        assert found, method.__name__


def test_steps_end_in_the_order_in_which_they_were_scheduled() -> None:
    """Relies on the engine's queue of steps in flight, and on its length."""
    source = source_of(EngineCore.step_with_batch_queue)
    assert "batch_queue.appendleft(" in source
    assert "= batch_queue.pop()" in source
    assert "self.batch_queue_size = vllm_config.max_concurrent_batches" in source_of(EngineCore.__init__)


def test_the_number_of_batches_in_flight_can_be_set() -> None:
    """Relies on ``VllmConfig.max_concurrent_batches`` being a property, and one without asynchronous scheduling."""
    config = VllmConfig()
    config.scheduler_config.async_scheduling = False
    assert with_batches_in_flight(config, 1).max_concurrent_batches == 1
    assert with_batches_in_flight(config, 2).max_concurrent_batches == 2


def test_facts_travel_with_the_configuration() -> None:
    """Relies on ``VllmConfig`` keeping attributes that are not its fields, also when it is pickled."""
    config = VllmConfig()
    facts_of(config).block_placement = ("sequence", [3, 4])
    assert facts_of(config).block_placement == ("sequence", [3, 4])
    assert facts_of(pickle.loads(pickle.dumps(config))).block_placement == ("sequence", [3, 4])
    assert facts_of(VllmConfig()).block_placement is None


@pytest.mark.parametrize("lane", [0, 1])
def test_a_step_carries_its_lane(lane: int) -> None:
    """Relies on ``SchedulerOutput`` keeping an attribute that is not its field, also when it is pickled."""
    output = SchedulerOutput.make_empty()
    mark_lane(output, lane)
    assert lane_of(pickle.loads(pickle.dumps(output))) == lane


def test_a_step_says_what_it_computes() -> None:
    """Relies on ``num_scheduled_tokens``, and on the output of a step being taken for the requests in it only."""
    assert dataclasses.is_dataclass(SchedulerOutput)
    assert "num_scheduled_tokens" in {field.name for field in dataclasses.fields(SchedulerOutput)}
    source = source_of(Scheduler.update_from_output)
    assert "for req_id, num_tokens_scheduled in num_scheduled_tokens.items()" in source
    assert "num_scheduled_tokens = scheduler_output.num_scheduled_tokens" in source


def test_a_request_is_known_by_what_it_has() -> None:
    """Relies on these attributes of ``Request``."""
    made = source_of(Request.__init__)
    for name in ("request_id", "lora_request", "num_computed_tokens"):
        assert re.search(rf"self\.{name}\b.* = ", made), name
    assert isinstance(Request.num_tokens, property)
    assert callable(Request.is_finished)


def test_a_step_can_be_taken_back() -> None:
    """Relies on these counters of ``Request``, and on ``_update_after_schedule`` being what advances them."""
    made = source_of(Request.__init__)
    for name in (
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_stale_output_tokens",
        "is_prefill_chunk",
    ):
        assert f"self.{name}" in made
    advanced = source_of(Scheduler._update_after_schedule)
    assert "num_computed_tokens += num_scheduled_token" in advanced
    assert "num_in_flight_tokens += num_scheduled_token" in advanced


def test_vllm_can_be_kept_from_preempting() -> None:
    """Relies on its order of preemption; on it preempting nobody whose blocks would not be free at once, and then not
    scheduling the request that lacks them, nor those after it; and on who is preempted being asked for before.
    """
    schedule = re.sub(r"\s+", " ", re.sub(r"#[^\n]*", "", source_of(Scheduler.schedule)))
    # 0.33 goes on after a request that has preempted itself.
    given_up = re.search(
        r"if new_blocks is None: (if \( self\.policy == SchedulingPolicy\.PRIORITY and request\.status == "
        r"RequestStatus\.PREEMPTED \): continue )?break",
        schedule,
    )
    assert given_up is not None
    wanted, chosen, asked, preempted = (
        schedule.index(text)
        for text in (
            "new_blocks = self.kv_cache_manager.allocate_slots(",
            "key=lambda r: (r.priority, r.arrival_time),",
            "if not self._request_blocks_can_be_freed(preempted_req): break",
            "self._preempt_request(",
        )
    )
    assert wanted < chosen < asked < preempted < given_up.start()
    assert "preempted_req = self.running[-1]" in schedule[:asked]


def test_a_long_prompt_is_cut_by_the_number_of_requests() -> None:
    """Relies on ``get_request_counts`` for whether there are others."""
    schedule = source_of(Scheduler.schedule)
    assert "num_running, num_waiting = self.get_request_counts()" in schedule
    assert "if num_eligible_reqs > 1" in schedule


def test_what_is_in_flight_for_a_preempted_request_counts() -> None:
    """Relies on stale output that is not to be dropped being taken as any other, and on its request not being admitted
    before; and on a queue of FCFS being a ``deque``, in which others may come before one that is preempted.
    """
    assert "if request.num_stale_output_tokens and not request.drop_stale_output:" in source_of(
        Scheduler.schedule
    )
    taken = source_of(Scheduler.update_from_output)
    assert "if output_is_stale and request.drop_stale_output:" in taken
    assert "request.num_stale_output_tokens = request.num_in_flight_tokens" in source_of(
        Scheduler._preempt_request
    )
    assert isinstance(create_request_queue(SchedulingPolicy.FCFS), deque)


def test_blocks_that_steps_in_flight_may_write_can_be_freed() -> None:
    """Relies on ``_drain_deferred_frees`` freeing those of steps up to ``processed_step_seq``."""
    drain = source_of(Scheduler._drain_deferred_frees)
    assert "if fence > self.processed_step_seq:" in drain
    assert "self.deferred_frees.popleft()" in drain
    assert "self.deferred_frees.append((self.sched_step_seq, blocks))" in source_of(
        Scheduler._free_request_blocks
    )


def test_requests_can_be_preempted_from_outside() -> None:
    """Relies on ``_preempt_request`` putting the request at the head of the queue, and on its caller taking it out of
    ``running``.
    """
    source = source_of(Scheduler._preempt_request)
    assert "self.waiting.prepend_request(request)" in source
    assert "self.running" not in source


def test_a_request_can_end_with_an_error() -> None:
    """Relies on ``update_from_output`` ending the requests in ``encoder_cache_mismatch_reqs`` with FINISHED_ERROR, and
    telling their clients.
    """
    assert "self.encoder_cache_mismatch_reqs: set[str] = set()" in source_of(Scheduler.__init__)
    _, _, ending = source_of(Scheduler.update_from_output).partition(
        "error_req_ids.update(self.encoder_cache_mismatch_reqs)"
    )
    assert "RequestStatus.FINISHED_ERROR" in ending
    assert "finish_reason=request.get_finished_reason()" in ending


def test_blocks_of_a_request_are_known_and_can_be_forgotten() -> None:
    """Relies on ``req_to_blocks`` of each group's manager, with the null block in the place of one that was given back,
    on ``BlockPool.blocks``, by id, and on ``BlockPool.evict_blocks``.
    """
    assert "self.single_type_managers" in source_of(KVCacheCoordinator.__init__)
    assert "self.req_to_blocks" in source_of(SingleTypeKVCacheManager.__init__)
    assert "blocks[i] = self._null_block" in source_of(SingleTypeKVCacheManager)
    assert [*inspect.signature(BlockPool.evict_blocks).parameters] == ["self", "block_ids"]
    pool = BlockPool(num_gpu_blocks=4, enable_caching=True, hash_block_size=16)
    assert [block.block_id for block in pool.blocks] == [0, 1, 2, 3]
    assert [block.is_null for block in pool.blocks] == [True, False, False, False]
    assert pool.get_num_free_blocks() == 3
    assert isinstance(KVCacheManager.usage, property)
    assert isinstance(KVCacheBlock(7).block_id, int)


def test_blocks_that_a_request_lacks_are_known() -> None:
    """Relies on what a group's manager counts them by; that it is counted rightly, simulations show at every step."""
    counted = source_of(SingleTypeKVCacheManager.get_num_blocks_to_allocate)
    assert "cdiv(num_tokens, self.block_size)" in counted
    assert "num_required_blocks, self.max_admission_blocks_per_request" in counted
    assert "len(self.req_to_blocks.get(request_id, ()))" in counted
    assert "total_computed_tokens - request.num_in_flight_tokens" in source_of(KVCacheManager.allocate_slots)


def test_free_blocks_can_be_replaced() -> None:
    """Relies on the block pool using its queue by these methods alone, and on blocks being taken for a request only in
    ``allocate_slots``, whose first parameter is the request, and there in each group's ``allocate_new_blocks``.
    """
    used = set(re.findall(r"free_block_queue\.(\w+)", inspect.getsource(block_pool)))
    # `popleft` takes the null block, when the pool is built.
    assert used == {"popleft", "popleft_n", "remove", "append_n", "prepend_n", "num_free_blocks"}
    parameters = [*inspect.signature(KVCacheManager.allocate_slots).parameters]
    assert parameters[:3] == ["self", "request", "num_new_tokens"]
    assert "reserved_blocks" in parameters
    assert "kv_cache_manager.allocate_slots(" in inspect.getsource(scheduler)
    assert "manager.allocate_new_blocks(" in source_of(KVCacheCoordinator.allocate_new_blocks)
    of_group = [*inspect.signature(SingleTypeKVCacheManager.allocate_new_blocks).parameters]
    assert of_group[:2] == ["self", "request_id"]
    assert "self.block_pool.get_new_blocks(" in source_of(SingleTypeKVCacheManager.allocate_new_blocks)


@pytest.mark.parametrize(
    ("computed", "tokens", "kept"), [(0, 10, 10), (0, 12, 0), (12, 7, 0), (12, 8, 8), (20, 5, 5)]
)
def test_no_step_ends_within_an_input_that_is_seen_whole(
    computed: int, tokens: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of tokens 10 to 19; relies on ``mm_position``, and on vLLM's answer holding the tokens in second place."""
    answer = ([0], tokens, 50, [], [])
    monkeypatch.setattr(Scheduler, "_try_schedule_encoder_inputs", lambda *arguments: answer)
    port = object.__new__(SchedulerPort)
    model = SimpleNamespace(is_mm_prefix_lm=True)
    port.vllm_config = SimpleNamespace(model_config=model)
    position = SimpleNamespace(offset=10, length=10)
    request = SimpleNamespace(mm_features=[SimpleNamespace(mm_position=position)])
    assert port._try_schedule_encoder_inputs(request, computed, tokens, 60)[1] == kept
    model.is_mm_prefix_lm = False
    assert port._try_schedule_encoder_inputs(request, computed, tokens, 60) == answer
