"""What recovering from lost attention workers relies on in vLLM."""

import dataclasses
import inspect


def test_a_step_can_be_taken_back() -> None:
    """Relies on these counters of ``Request``, and on ``_update_after_schedule`` being what advances them."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    made = inspect.getsource(Request.__init__)
    for name in (
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_stale_output_tokens",
        "is_prefill_chunk",
    ):
        assert f"self.{name}" in made
    advanced = inspect.getsource(Scheduler._update_after_schedule)
    assert "num_computed_tokens += num_scheduled_token" in advanced
    assert "num_in_flight_tokens += num_scheduled_token" in advanced


def test_requests_can_be_preempted_from_outside() -> None:
    """Relies on ``_preempt_request``, on its caller taking the request out of ``running``, and on
    ``prev_step_scheduled_req_ids`` being the memory of what the model worker's batch holds.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    parameters = [*inspect.signature(Scheduler._preempt_request).parameters]
    assert parameters == ["self", "request", "timestamp", "drop_stale_output"]
    assert "self.prev_step_scheduled_req_ids" in inspect.getsource(Scheduler._make_cached_request_data)


def test_blocks_of_a_request_are_known_and_can_be_forgotten() -> None:
    """Relies on ``req_to_blocks`` of the one manager of full attention, and on ``BlockPool.evict_blocks``."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    assert "self.single_type_managers" in inspect.getsource(KVCacheCoordinator.__init__)
    assert "self.req_to_blocks" in inspect.getsource(SingleTypeKVCacheManager.__init__)
    assert [*inspect.signature(BlockPool.evict_blocks).parameters] == ["self", "block_ids"]


def test_a_step_that_ran_can_go_without_sampling() -> None:
    """Relies on ``execute_model_state`` being all that a runner keeps between a step and its sampling."""
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "if self.execute_model_state is not None" in inspect.getsource(GPUModelRunner.execute_model)
    assert "self.execute_model_state = None" in inspect.getsource(GPUModelRunner.sample_tokens)
    required = [f.name for f in dataclasses.fields(ModelRunnerOutput) if f.default is dataclasses.MISSING]
    assert {"req_ids", "req_id_to_index"} <= set(required)


def test_draws_for_nothing_are_taken_back_by_an_offset() -> None:
    """Relies on vLLM moving the generators of requests in ``discard_request_mask`` back by one draw's offset."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "self.discard_request_mask.np" in source
    assert "gen.set_offset(gen.get_offset() - 4)" in source


def test_a_request_can_end_with_an_error() -> None:
    """Relies on ``update_from_output`` ending the requests in ``grammar_compile_error_reqs`` with FINISHED_ERROR, and
    telling their clients.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    assert "self.grammar_compile_error_reqs: set[str] = set()" in inspect.getsource(Scheduler.__init__)
    source = inspect.getsource(Scheduler.update_from_output)
    _, _, ending = source.partition("error_req_ids = set(self.grammar_compile_error_reqs)")
    assert "RequestStatus.FINISHED_ERROR" in ending
    assert "finish_reason=request.get_finished_reason()" in ending
