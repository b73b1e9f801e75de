"""The lanes of a model worker: each runs its steps over the one model, several in turns on the compute device."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vllm_lamina.attention_backend.host_layers import StepFailed
from vllm_lamina.attention_backend.step import StepPlan
from vllm_lamina.compat.outputs import StepTimes, failed_step, report_times
from vllm_lamina.compat.ranks import any_rank
from vllm_lamina.compat.scheduled import ScheduledStep, keep_grammar
from vllm_lamina.compat.threads import set_num_threads
from vllm_lamina.compat.workspaces import grow_workspaces
from vllm_lamina.worker.model_worker.step_planner import StepPlanner

if TYPE_CHECKING:
    from vllm_lamina._native import AttentionClient
    from vllm_lamina.attention_backend.exchange import Exchange
    from vllm_lamina.attention_backend.step import PlannedRequest
    from vllm_lamina.compat.runner import LaneRunner

logger = init_logger("vllm.lamina")

JOIN_SECONDS = 5.0


class Lane:
    """One lane: its steps run one after the other.

    Where there are several, each runs on its own thread and they take turns; a single one runs on the caller's. A
    runner's tensors are touched by the lane's thread alone, in its turn. What waits for a device has no turn.
    """

    def __init__(
        self, index: int, runner: LaneRunner, exchange: Exchange, client: AttentionClient, has_thread: bool
    ) -> None:
        self.index = index
        self.runner = runner
        self.to_forget: set[str] = set()
        """Requests that are over, whose last step was this lane's; its runner forgets them with its next step."""
        self._exchange = exchange
        self._client = client
        self._seconds = 0.0
        """What the step took so far, without what it waited for its turns."""
        self._executed: Future[Any] = Future()
        self._num_threads = torch.get_num_threads()
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if has_thread:
            self._thread = threading.Thread(target=self._run, name=f"lamina-lane-{index}", daemon=True)
            self._thread.start()
            try:
                self.do(self._enter)
            except BaseException:
                self.stop()
                raise

    def execute(
        self, step: ScheduledStep, requests: Mapping[str, PlannedRequest], inputs_to_forget: Set[str]
    ) -> None:
        """Begin a step, after all that were begun before in any lane. Its error, if any, is that of its `sample`."""
        # Here, not on the lane's thread: the order of the steps is the order in which they were scheduled.
        self._exchange.layers.announce(self.index)
        plan = StepPlan(requests, self.runner.order)
        output = step.for_runner(self.to_forget, inputs_to_forget)
        self.to_forget = set()

        def execute() -> Any:
            self._seconds = 0.0
            with self._turn(), self._timed():
                self._exchange.layers.begin(self.index)
                try:
                    with self._exchange.running(self.index, plan):
                        return self.runner.execute(output)
                except StepFailed:
                    return None

        self._executed = self._submit(execute)

    def sample(self, grammar_output: Any) -> Future[Any]:
        """End the step that was begun last: the future holds what it sampled."""
        executed = self._executed

        def sample() -> Any:
            output = executed.result()
            with self._timed():
                self._exchange.layers.wait(self.index)
            with self._turn(), self._timed():
                # The ranks agree: sampling with log-probabilities of the prompt waits for all of them.
                if any_rank(self._exchange.layers.take_failure(self.index) is not None):
                    self.runner.forget_step()
                    return failed_step()
                get_output = None if output is not None else self.runner.sample(grammar_output)
                self._exchange.layers.end(self.index)
            if get_output is not None:
                with self._timed():
                    output = get_output()
            report_times(output, self._times())
            return output

        return self._submit(sample)

    def do(self, task: Callable[[], Any]) -> Any:
        """What the task returns, on the lane's thread; after the steps that were begun."""
        return self._submit(task).result()

    def finish_steps(self) -> None:
        """Wait until the steps that were begun are over, whatever came of them."""
        self.do(lambda: self._exchange.layers.synchronize(self.index))

    def stop(self) -> None:
        """End the thread, after what it is doing."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join(JOIN_SECONDS)

    def _times(self) -> StepTimes:
        """The times of the step that is over."""
        waiting, attention = self._client.step_times(self.index)
        return StepTimes(self._seconds - waiting, attention, *self._client.step_waits(self.index))

    def _submit(self, task: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self._thread is not None:
            self._tasks.put((future, task))
        else:
            self._run_task(future, task)
        return future

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The host's turn of all lanes: to work on tensors, or to enqueue such work."""
        self._client.begin_turn(self.index, self._exchange.timeout)
        try:
            yield
        finally:
            self._client.end_turn(self.index)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - begin

    def _enter(self) -> None:
        set_num_threads(self._num_threads)  # a setting of the thread
        self._exchange.layers.enter(self.index)

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            self._run_task(*item)

    def _run_task(self, future: Future[Any], task: Callable[[], Any]) -> None:
        try:
            with torch.inference_mode():  # another one
                result = task()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)


class Lanes:
    """The lanes of a model worker, one or several, and which of them runs each request.

    Of several ranks of a model vLLM asks one for its output: ``answers`` says whether it is this one.
    """

    def __init__(
        self,
        runners: Sequence[LaneRunner],
        exchange: Exchange,
        client: AttentionClient,
        kv_groups: Sequence[int],
        answers: bool,
    ) -> None:
        self._lanes = [
            Lane(index, runner, exchange, client, has_thread=len(runners) > 1)
            for index, runner in enumerate(runners)
        ]
        self._planner = StepPlanner(kv_groups)
        self._answers = answers
        self._shared_places = runners[0].shared_places
        self._last = self._lanes[0]
        self._lane_of: dict[str, Lane] = {}
        """The lane that ran a request's last step."""
        self._inputs_to_forget: set[str] = set()
        """Multimodal inputs that the next step of any lane forgets: encoder outputs are all lanes'."""

    def __len__(self) -> int:
        return len(self._lanes)

    def execute(self, step: ScheduledStep) -> None:
        """Begin a step on its lane; where there are several, returns at once."""
        requests = self._planner.plan(step)
        over = step.finished if self._shared_places is None else step.finished | step.preempted
        for name in over:
            if (last := self._lane_of.pop(name, None)) is not None:
                last.to_forget.add(name)
        self._inputs_to_forget.update(step.inputs_to_forget)
        if step.num_tokens == 0:
            return
        lane = self._last = self._lanes[step.lane]
        for adapter in step.adapters:
            self.finish_steps()
            lane.runner.load_adapter(adapter)
        if self._shared_places is not None:
            new = {request.name for request in step.requests if request.is_new}
            self._make_places(lane, new, self._shared_places)
        for request in step.requests:
            self._lane_of[request.name] = lane
        lane.execute(step, requests, self._inputs_to_forget)
        self._inputs_to_forget = set()

    def _make_places(self, lane: Lane, new: Set[str], num_places: int) -> None:
        """Let the lane forget what is over in other lanes too, if its new requests need these names or places.

        Not sooner: a step in flight has its requests' places until it is over. All ranks do the same, whatever is over
        on each, for they go by what was scheduled.
        """
        others = [other for other in self._lanes if other is not lane]
        num_held = sum(len(other.to_forget) for other in others)
        if len(self._lane_of) + num_held + len(new) > num_places or any(
            not other.to_forget.isdisjoint(new) for other in others
        ):
            self.finish_steps()
            for other in others:
                lane.to_forget |= other.to_forget
                other.to_forget = set()

    def sample(self, grammar_output: Any) -> Future[Any]:
        """What the step begun last samples: vLLM's output, when it is there."""
        sampled = self._last.sample(keep_grammar(grammar_output))
        if not self._answers:
            sampled.add_done_callback(_end_process_on_failure)
        return sampled

    def warm_up(self, warm_up_first: Callable[[], Any]) -> Any:
        """What ``warm_up_first`` returns, which warms up the first lane's runner; then further lanes capture graphs.

        Each on its lane's thread: what a graph holds may be the thread's own, such as the mapping of adapters.
        """
        first, *others = self._lanes
        first.runner.use_graphs()
        warmed = first.do(warm_up_first)
        for lane in others:
            grow_workspaces()
            lane.do(lane.runner.capture)
            grow_workspaces()  # a capture locks them again
        return warmed

    def finish_steps(self) -> None:
        """Wait until no lane has a step in flight."""
        for lane in self._lanes:
            lane.finish_steps()

    def stop(self) -> None:
        """End all lanes."""
        for lane in self._lanes:
            lane.stop()


def _end_process_on_failure(sampled: Future[Any]) -> None:
    """For a rank that nobody asks for its output: the other ranks would wait for it for ever."""
    error = sampled.exception()
    if error is not None:
        logger.error("Lamina: a step failed on this rank of the model; ending it.", exc_info=error)
        os.kill(os.getpid(), signal.SIGKILL)
