"""Two lanes over one model: each has a model runner and a thread, and they use the compute device in turns."""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from vllm.logger import init_logger
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_lamina.attention_backend.exchange import StepFailed
from vllm_lamina.compat.failed_steps import forget_step, step_failed
from vllm_lamina.compat.random_states import keep_random_states
from vllm_lamina.compat.step_lane import lane_of
from vllm_lamina.compat.step_times import report_times, times_of_step
from vllm_lamina.compat.threads import set_num_threads

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput

    from vllm_lamina.attention_backend.exchange import Exchange

logger = init_logger("vllm.lamina")

JOIN_SECONDS = 5.0


class Lane:
    """One lane: its steps run one after the other on its own thread.

    The runner keeps its input batch from step to step, so a lane's requests are added to it once. Weights are shared
    with the other lane's runner.
    """

    def __init__(self, index: int, runner: Any, exchange: Exchange) -> None:
        self.runner = runner
        self.finished_req_ids: set[str] = set()
        """Requests that have finished since the lane's last step, and may still be in its input batch."""
        self._index = index
        self._exchange = exchange
        self._client = exchange.client
        self._num_threads = torch.get_num_threads()
        self._execute_seconds = 0.0
        self._executed: Future[Any] = Future()
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"lamina-lane-{index}", daemon=True)
        self._thread.start()

    def execute(self, scheduler_output: SchedulerOutput) -> None:
        """Begin a step, after all that were begun before in any lane. Its error, if any, is that of its `sample`."""
        # Here, not on the lane's thread: the order of the steps is the order in which they were scheduled.
        self._client.join_turn(self._index)

        def execute() -> ModelRunnerOutput | None:
            begin = time.perf_counter()
            try:
                return self.runner.execute_model(scheduler_output)
            except StepFailed:
                return None
            finally:
                self._execute_seconds = time.perf_counter() - begin

        self._executed = self._submit(execute)

    def sample(self, grammar_output: GrammarOutput | None) -> Future[ModelRunnerOutput]:
        """End the step that was begun last: the future holds what it sampled."""
        executed = self._executed

        def sample() -> ModelRunnerOutput:
            begin = time.perf_counter()
            output = executed.result()
            if step_failed(self._exchange, self._index):
                return forget_step(self.runner)
            if output is None:
                keep_random_states(self.runner)
                output = self.runner.sample_tokens(grammar_output)
            seconds = self._execute_seconds + time.perf_counter() - begin
            report_times(output, times_of_step(self._client, self._index, seconds))
            return output

        return self._submit(sample)

    def take_over(self, request_id: str, other: Lane) -> None:
        """Take a request that another lane has run so far; this lane must be idle, and the request not in flight."""
        # This lane's input batch may still hold what it was when it left, or an earlier request of the same name.
        self.runner.input_batch.remove_request(request_id)
        self.finished_req_ids.discard(request_id)
        # The state itself is shared: should the request come back, the other lane's is up to date.
        self.runner.requests[request_id] = other.runner.requests[request_id]
        if request_id in other.runner.num_prompt_logprobs:
            self.runner.num_prompt_logprobs[request_id] = other.runner.num_prompt_logprobs.pop(request_id)

    def finish_steps(self) -> None:
        """Wait until the steps that were begun are over, whatever came of them."""
        self._submit(lambda: None).result()

    def stop(self) -> None:
        """End the thread, after what it is doing."""
        self._tasks.put(None)
        self._thread.join(JOIN_SECONDS)

    def _submit(self, task: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, task))
        return future

    def _run(self) -> None:
        # Both settings belong to the thread.
        set_num_threads(self._num_threads)
        with torch.inference_mode():
            while (item := self._tasks.get()) is not None:
                future, task = item
                try:
                    future.set_result(self._in_turn(task))
                except BaseException as error:
                    future.set_exception(error)

    def _in_turn(self, task: Callable[[], Any]) -> Any:
        self._client.begin_turn(self._index, self._exchange.timeout)
        try:
            return task()
        finally:
            self._client.end_turn(self._index)


class Lanes:
    """The lanes of a model worker, driven by vLLM's ``execute_model`` and ``sample_tokens``.

    Of several ranks of a model vLLM asks one for its output: ``answers`` says whether it is this one.
    """

    def __init__(self, lanes: list[Lane], answers: bool) -> None:
        self._lanes = lanes
        self._answers = answers
        self._last = lanes[0]
        self._lane_of: dict[str, Lane] = {}
        """The lane that ran a request's last step."""

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Begin the step of the lane that the scheduler chose; returns at once."""
        for lane in self._lanes:
            lane.finished_req_ids |= scheduler_output.finished_req_ids
        for request_id in scheduler_output.finished_req_ids:
            self._lane_of.pop(request_id, None)
        if scheduler_output.total_num_scheduled_tokens == 0:
            return EMPTY_MODEL_RUNNER_OUTPUT
        lane = self._last = self._lanes[lane_of(scheduler_output)]
        for request in scheduler_output.scheduled_new_reqs:
            self._lane_of[request.req_id] = lane
            if request.lora_request is not None and request.lora_request.load_inplace:
                self._load_in_place(lane, request)
        for request_id in scheduler_output.scheduled_cached_reqs.req_ids:
            other = self._lane_of[request_id]
            if other is not lane:
                lane.take_over(request_id, other)
                self._lane_of[request_id] = lane
        step = dataclasses.replace(scheduler_output, finished_req_ids=lane.finished_req_ids)
        lane.finished_req_ids = set()
        lane.execute(step)
        return None

    def _load_in_place(self, lane: Lane, request: NewRequestData) -> None:
        """Load the request's adapter anew. vLLM would in each step of the request, also amid one of another lane."""
        self.finish_steps()
        lane.runner.add_lora(request.lora_request)
        request.lora_request = msgspec.structs.replace(request.lora_request, load_inplace=False)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> AsyncModelRunnerOutput:
        """What the step begun last samples, when it is done."""
        if grammar_output is not None and grammar_output.grammar_bitmask is not None:
            # In the engine's own process this is a view of a buffer that the next step of any lane overwrites.
            bitmask = grammar_output.grammar_bitmask.copy()
            grammar_output = dataclasses.replace(grammar_output, grammar_bitmask=bitmask)
        sampled = self._last.sample(grammar_output)
        if not self._answers:
            sampled.add_done_callback(_end_process_on_failure)
        return _LaneOutput(sampled)

    def finish_steps(self) -> None:
        """Wait until no lane has a step in flight."""
        for lane in self._lanes:
            lane.finish_steps()

    def stop(self) -> None:
        """End all lanes."""
        for lane in self._lanes:
            lane.stop()


def _end_process_on_failure(sampled: Future[ModelRunnerOutput]) -> None:
    """For a rank that nobody asks for its output: the other ranks would wait for it for ever."""
    error = sampled.exception()
    if error is not None:
        logger.error("Lamina: a step failed on this rank of the model; ending it.", exc_info=error)
        os.kill(os.getpid(), signal.SIGKILL)


class _LaneOutput(AsyncModelRunnerOutput):
    def __init__(self, sampled: Future[ModelRunnerOutput]) -> None:
        self._sampled = sampled

    def get_output(self) -> ModelRunnerOutput:
        return self._sampled.result()
