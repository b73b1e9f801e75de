"""Runs jobs of `jobs.py` in vLLM, each in a forked process of its own, so that no state of one engine reaches another.

Importing vLLM takes much longer than starting a small engine. This program imports it once, single-threaded, and
forks for every job that it reads from its standard input: one line `JOB_FILE RESULT_FILE LOG_FILE [HOST]` each. It
answers each with a line holding the process id of the fork, and one with its exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adversary
import cpu_graph
import cpu_stream
import runners
from cores import ATTENTION_CPU
from jobs import RESET, Call, Completion, Job, JobResult, Phase, PhaseResult, Request, RequestResult
from media import media_of
from msgspec.structs import replace

# Modules that every fork would otherwise import for itself.
INHERITED = (
    "vllm.entrypoints.llm",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
)
INHERITED_V2 = ("vllm.v1.worker.cpu.model_runner",)

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
MS_REC, MS_SLAVE, MNT_DETACH = 0x4000, 0x80000, 2
"""From Linux's headers: Python has names for them from 3.12 on, or none."""

SESSION_STEPS = 15
"""Engine steps from one input of a session to the next."""


def main() -> None:
    for module in INHERITED + INHERITED_V2 * (runners.DEFAULT == runners.V2):
        importlib.import_module(module)
    # vLLM asks a process of its own about the class of each model, for as long as importing vLLM takes.
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda inspect: inspect()
    # vLLM collects garbage several times in the life of an engine, each time for as long as its modules are many.
    gc.collect()
    gc.freeze()

    for line in sys.stdin:
        job_file, result_file, log_file, *host = line.split()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            _redirect(log_file)
            for namespace in host:
                _enter(namespace)
            Path(result_file).write_text(run(Job.from_json(Path(job_file).read_text())).to_json())
            _exit()
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _redirect(log_file: str) -> None:
    """Sends all output of this process and its children to the log; leaves the line protocol to the parent."""
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)


def _exit() -> None:
    """End as an interpreter does, without taking down its modules, which takes as long as an engine's start."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _enter(namespace: str) -> None:
    """Go where `ip netns exec NAMESPACE` runs a program: UCX finds interfaces in /sys, which is one host's."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> None:
        if getattr(libc, name)(*arguments) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"{name}: {os.strerror(error)}")

    with open(f"/run/netns/{namespace}") as file:
        call("setns", file.fileno(), CLONE_NEWNET)
    call("unshare", CLONE_NEWNS)
    call("mount", b"", b"/", b"none", MS_REC | MS_SLAVE, None)
    call("umount2", b"/sys", MNT_DETACH)
    call("mount", namespace.encode(), b"/sys", b"sysfs", 0, None)


class Adapters:
    """vLLM's requests of LoRA adapters: each directory has a number of its own."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, directory: str) -> Any:
        from vllm.lora.request import LoRARequest

        number = self._numbers.setdefault(directory, len(self._numbers) + 1)
        return LoRARequest(Path(directory).name, number, directory)


def run(job: Job) -> JobResult:
    """Starts the engine, runs the job's phases one after the other, and shuts the engine down."""
    from vllm import LLM

    os.environ.update(job.environment)
    if job.random_lanes is not None:
        adversary.provoke(job.random_lanes)
    if job.streams:
        cpu_stream.use_streams()
    if job.graphs:
        cpu_graph.use_graphs()
    with contextlib.ExitStack() as stack:
        pool: dict[str, Any] = {"kv_cache_memory_bytes": job.kv_memory_mib << 20}
        if job.executor is not None:
            pool = {"executor": job.executor, **_pool_options(job, stack)}
            # Two batches in flight wherever there are two requests, also where these small models gain nothing by it.
            pool["lamina_stagger"] = "always"
        llm = LLM(job.model, disable_log_stats=False, **pool, **job.engine)
        stack.callback(llm.llm_engine.engine_core.shutdown)
        executor = type(llm.llm_engine.model_executor).__name__
        adapters = Adapters()
        phases = [_run_phase(llm, phase, adapters) for phase in job.phases]
        return JobResult(executor, phases, dict(adversary.COUNTS + cpu_stream.COUNTS))


def _pool_options(job: Job, stack: contextlib.ExitStack) -> dict[str, Any]:
    from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker

    if "lamina_workers" in job.engine or "lamina_ray" in job.engine:
        return {}
    if not job.worker_memory_mib:
        return {"lamina_memory": f"{job.kv_memory_mib}MiB"}
    addresses = []
    for mib in job.worker_memory_mib:
        worker = EmbeddedAttentionWorker.start(mib << 20, [int(ATTENTION_CPU)])
        stack.callback(worker.stop)
        addresses.append(worker.address)
    return {"lamina_workers": ",".join(addresses)}


def _run_phase(llm: Any, phase: Phase, adapters: Adapters) -> PhaseResult:
    engine = llm.llm_engine
    before = _counters(llm)
    waiting = sorted(_inputs(phase), key=lambda item: item[0])
    sessions: dict[int, Any] = {}
    results = [RequestResult([], []) for _ in phase.requests]
    aborted: set[str] = set()
    abort_at: dict[str, int] = {}
    """The engine step after which a request is to be aborted."""
    calls = list(phase.calls)
    tokens_at_calls = []
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and (waiting[0][0] <= step or not engine.has_unfinished_requests()):
            _, index, tokens = waiting.pop(0)
            name, request = f"{phase.name}-{index}", phase.requests[index]
            if request.more:
                sessions[index] = _add_to_session(engine, name, request, tokens, sessions.get(index))
                continue
            adapter = adapters(request.adapter) if request.adapter is not None else None
            prompt: dict[str, Any] = {"prompt_token_ids": tokens}
            if request.media:
                prompt["multi_modal_data"] = media_of(request.media)
            engine.add_request(name, prompt, _sampling_params(request.params), lora_request=adapter)
            if request.abort_after == 0:
                abort_at[name] = step + request.abort_delay
        outputs = engine.step()
        step += 1
        for output in outputs:
            if output.request_id in aborted:
                continue
            index = int(output.request_id.rpartition("-")[2])
            _record(results[index], output)
            if _abort_is_due(phase.requests[index], results[index]):
                abort_at.setdefault(output.request_id, step + phase.requests[index].abort_delay)
        for name in [name for name, its_step in abort_at.items() if its_step <= step]:
            engine.abort_request([name])
            aborted.add(name)
            del abort_at[name]
        while calls and (
            _num_tokens(results[0]) >= calls[0].after_tokens or not engine.has_unfinished_requests()
        ):
            tokens_at_calls.append([_num_tokens(result) for result in results])
            _call(llm, calls.pop(0))
    gained = {name: value - before[name] for name, value in _counters(llm).items()}
    return PhaseResult(
        phase.name,
        results,
        gained["vllm:num_preemptions"],
        gained["vllm:prefix_cache_hits"],
        tokens_at_calls,
    )


def _call(llm: Any, call: Call) -> None:
    if call.method == RESET:
        assert llm.reset_prefix_cache(**call.arguments), "the prefix cache was not reset"
        return
    module, _, name = call.method.partition(":")
    if name:
        function = getattr(importlib.import_module(module), name)
        llm.apply_model(functools.partial(function, **call.arguments))
    else:
        llm.collective_rpc(call.method, kwargs=call.arguments)


def _num_tokens(result: RequestResult) -> int:
    """Output tokens of a request's first sequence."""
    return len(result.completions[0].token_ids) if result.completions else 0


def _inputs(phase: Phase) -> Iterator[tuple[int, int, list[int] | None]]:
    """When which request gets which tokens, in steps; None ends a session."""
    for index, request in enumerate(phase.requests):
        end = (None,) if request.more else ()
        for number, tokens in enumerate((request.prompt, *request.more, *end)):
            yield request.after_step + SESSION_STEPS * number, index, tokens


def _add_to_session(engine: Any, name: str, request: Request, tokens: list[int] | None, first: Any) -> Any:
    """What the server does, for the offline engine has no interface for sessions; returns the session's first input."""
    part = engine.input_processor.process_inputs(
        name,
        {"prompt_token_ids": tokens or [0]},
        _sampling_params(request.params),
        supported_tasks=engine.get_supported_tasks(),
        resumable=tokens is not None,
    )
    if first is None:
        engine.input_processor.assign_request_id(part)
        first = part
    part.request_id, part.external_req_id = first.request_id, first.external_req_id
    engine.output_processor.add_request(part, None, None, 0)
    # Both sides make their prompt longer: in a server each has a list of its own.
    engine.engine_core.add_request(replace(part, prompt_token_ids=list(part.prompt_token_ids)))
    return first


def _sampling_params(params: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    params = dict(params)
    if "structured_outputs" in params:
        params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
    if "logit_bias" in params:  # JSON's keys are strings; token ids are not
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    if "repetition_detection" in params:
        params["repetition_detection"] = RepetitionDetectionParams(**params["repetition_detection"])
    return SamplingParams(**params)


def _record(result: RequestResult, output: Any) -> None:
    """Puts vLLM's cumulative output in the place of what is known of the request."""
    for sequence in output.outputs:
        while len(result.completions) <= sequence.index:
            result.completions.append(Completion([], [], "", None))
        result.completions[sequence.index] = Completion(
            token_ids=list(sequence.token_ids),
            logprobs=[_values(position) for position in sequence.logprobs or []],
            text=sequence.text,
            finish_reason=sequence.finish_reason,
        )
    if output.prompt_logprobs:
        result.prompt_logprobs[:] = [_values(position) for position in output.prompt_logprobs]


def _values(position: dict[int, Any] | None) -> dict[int, float]:
    """Token id -> log-probability; the first prompt token has none."""
    return {token: entry.logprob for token, entry in (position or {}).items()}


def _abort_is_due(request: Request, result: RequestResult) -> bool:
    return request.abort_after is not None and _num_tokens(result) >= request.abort_after


def _counters(llm: Any) -> dict[str, int]:
    names = ("vllm:num_preemptions", "vllm:prefix_cache_hits")
    return {metric.name: int(metric.value) for metric in llm.get_metrics() if metric.name in names}


if __name__ == "__main__":
    main()
