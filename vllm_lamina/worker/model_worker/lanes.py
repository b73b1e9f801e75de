"""The lanes of a model worker: each runs its steps over the one model, several in turns on the compute device."""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from vllm.logger import init_logger
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_lamina.attention_backend.exchange import StepFailed
from vllm_lamina.attention_backend.step import StepPlan
from vllm_lamina.compat.lane_marks import lane_of
from vllm_lamina.compat.ranks import any_rank
from vllm_lamina.compat.step_reports import StepTimes, failed_step, report_times
from vllm_lamina.compat.threads import set_num_threads
from vllm_lamina.worker.model_worker.step_planner import StepPlanner

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput

    from vllm_lamina.attention_backend.exchange import Exchange
    from vllm_lamina.attention_backend.step import PlannedRequest
    from vllm_lamina.compat.runner import LaneRunner

logger = init_logger("vllm.lamina")

JOIN_SECONDS = 5.0


class Lane:
    """One lane: its steps run one after the other.

    Where there are several, each runs on its own thread and they take turns; a single one runs on the caller's.
    """

    def __init__(self, index: int, runner: LaneRunner, exchange: Exchange, has_thread: bool) -> None:
        self.index = index
        self.runner = runner
        self.finished_req_ids: set[str] = set()
        """Requests that have finished since the lane's last step, and that its runner may still know."""
        self._exchange = exchange
        self._client = exchange.client
        self._execute_seconds = 0.0
        self._executed: Future[Any] = Future()
        self._num_threads = torch.get_num_threads()
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if has_thread:
            self._thread = threading.Thread(target=self._run, name=f"lamina-lane-{index}", daemon=True)
            self._thread.start()

    def execute(self, output: SchedulerOutput, requests: Mapping[str, PlannedRequest]) -> None:
        """Begin a step, after all that were begun before in any lane. Its error, if any, is that of its `sample`."""
        # Here, not on the lane's thread: the order of the steps is the order in which they were scheduled.
        self._client.join_turn(self.index)
        plan = StepPlan(requests, self.runner.order)

        def execute() -> ModelRunnerOutput | None:
            begin = time.perf_counter()
            try:
                with self._exchange.running(self.index, plan):
                    return self.runner.execute(output)
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
            # The ranks agree: sampling with log-probabilities of the prompt waits for all of them.
            if any_rank(self._exchange.take_failure(self.index) is not None):
                self.runner.forget_step()
                return failed_step()
            if output is None:
                output = self.runner.sample(grammar_output)
            report_times(output, self._times(self._execute_seconds + time.perf_counter() - begin))
            return output

        return self._submit(sample)

    def take_over(self, request_id: str, other: Lane) -> None:
        """Take a request that another lane has run so far; this lane must be idle, and the request not in flight."""
        self.finished_req_ids.discard(request_id)
        self.runner.take_over(request_id, other.runner)

    def finish_steps(self) -> None:
        """Wait until the steps that were begun are over, whatever came of them."""
        if self._thread is not None:
            self._submit(lambda: None).result()

    def stop(self) -> None:
        """End the thread, after what it is doing."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(JOIN_SECONDS)

    def _times(self, seconds: float) -> StepTimes:
        """The times of the step that took ``seconds`` from its begin to its output."""
        waiting, attention = self._client.step_times(self.index)
        return StepTimes(seconds - waiting, attention, *self._client.step_waits(self.index))

    def _submit(self, task: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self._thread is not None:
            self._tasks.put((future, task))
        else:
            self._run_task(future, task)
        return future

    def _run(self) -> None:
        set_num_threads(self._num_threads)  # a setting of the thread
        while (item := self._tasks.get()) is not None:
            self._run_task(*item)

    def _run_task(self, future: Future[Any], task: Callable[[], Any]) -> None:
        try:
            self._client.begin_turn(self.index, self._exchange.timeout)
            try:
                with torch.inference_mode():  # another one
                    result = task()
            finally:
                self._client.end_turn(self.index)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)


class Lanes:
    """The lanes of a model worker, one or several, driven by vLLM's ``execute_model`` and ``sample_tokens``.

    Of several ranks of a model vLLM asks one for its output: ``answers`` says whether it is this one.
    """

    def __init__(self, runners: Sequence[LaneRunner], exchange: Exchange, answers: bool) -> None:
        self._lanes = [
            Lane(index, runner, exchange, has_thread=len(runners) > 1) for index, runner in enumerate(runners)
        ]
        self._planner = StepPlanner()
        self._answers = answers
        self._last = self._lanes[0]
        self._lane_of: dict[str, Lane] = {}
        """The lane that ran a request's last step."""

    def __len__(self) -> int:
        return len(self._lanes)

    def execute_model(self, output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Begin the step of the lane that the scheduler chose; where there are several, returns at once."""
        requests = self._planner.plan(output)
        for lane in self._lanes:
            lane.finished_req_ids |= output.finished_req_ids
        for request_id in output.finished_req_ids:
            self._lane_of.pop(request_id, None)
        if output.total_num_scheduled_tokens == 0:
            return EMPTY_MODEL_RUNNER_OUTPUT
        lane = self._last = self._lanes[lane_of(output)]
        for request in output.scheduled_new_reqs:
            self._lane_of[request.req_id] = lane
            if request.lora_request is not None and request.lora_request.load_inplace:
                self._load_in_place(lane, request)
        for request_id in output.scheduled_cached_reqs.req_ids:
            other = self._lane_of[request_id]
            if other is not lane:
                lane.take_over(request_id, other)
                self._lane_of[request_id] = lane
        step = dataclasses.replace(output, finished_req_ids=lane.finished_req_ids)
        lane.finished_req_ids = set()
        lane.execute(step, requests)
        return None

    def _load_in_place(self, lane: Lane, request: NewRequestData) -> None:
        """Load the request's adapter anew. vLLM would in each step of the request, also amid one of another lane."""
        self.finish_steps()
        lane.runner.load_adapter(request.lora_request)
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
