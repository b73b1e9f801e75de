"""Runs engine jobs with stock vLLM and with Lamina, and keeps the results of a test session."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

import runners
from cores import BIND
from jobs import Job, JobResult

# Quick to start, no network; one OpenMP thread, because the attention worker has the other core. Dynamo is off because
# vLLM compiles a function of its sampler even with enforce_eager, which takes seconds.
ENGINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
} | BIND

ENGINE_DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.2,
    "max_model_len": 1024,
    "seed": 0,
}


INTERPRETED = 5.0
"""How much longer than V1's a job of the V2 runner may take."""


class JobFailed(AssertionError):
    """The engine of a job did not finish it, or left processes behind."""


class Engines:
    """Runs each distinct job once; `directory` keeps jobs, results and logs. Use as a context manager.

    Those that are made `beside` others share their processes. With `host`, the name of a network namespace, their
    engines run there.
    """

    def __init__(self, directory: Path, beside: Engines | None = None, host: str = "") -> None:
        self._directory = directory
        self._host = host
        self._results: dict[str, JobResult] = {}
        self._processes: dict[str, subprocess.Popen[str]] = {} if beside is None else beside._processes
        """Of each model runner: the process that runs its jobs."""
        self._owns_processes = beside is None

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._owns_processes:
            self._stop()

    def run(self, job: Job, deadline: float = 180.0) -> JobResult:
        """The result of the job, with `ENGINE_DEFAULTS` filled in. Raises JobFailed, with the end of the log.

        The deadline, in seconds, is for the V1 runner; what an interpreter runs has longer.
        """
        job = replace(job, engine=ENGINE_DEFAULTS | job.engine)
        if job.runner == runners.V2:
            deadline *= INTERPRETED
        key = job.to_json()
        if key not in self._results:
            self._results[key] = self._run(key, job.runner, deadline)
        return self._results[key]

    def pair(self, job: Job, deadline: float = 180.0) -> tuple[JobResult, JobResult]:
        """The results of stock vLLM and of Lamina for the same job."""
        stock, lamina = self.run(job, deadline), self.run(replace(job, executor="lamina"), deadline)
        assert "Lamina" in lamina.executor, lamina.executor
        assert "Lamina" not in stock.executor, stock.executor
        return stock, lamina

    def _run(self, job: str, runner: str, deadline: float) -> JobResult:
        stem = self._directory / f"job-{len(list(self._directory.glob('*.log')))}"
        job_file, result_file, log_file = (stem.with_suffix(s) for s in (".json", ".result", ".log"))
        job_file.write_text(job)
        log_file.touch()
        if runner not in self._processes:
            self._processes[runner] = self._start(runner)
        process = self._processes[runner]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{job_file} {result_file} {log_file} {self._host}\n")
        process.stdin.flush()
        pid = self._read(process.stdout, deadline, log_file)
        status = self._read(process.stdout, deadline, log_file, group=pid)
        if _kill_group(pid, grace=30.0):
            raise JobFailed(f"the engine left processes behind\n{_tail(log_file)}")
        if status != 0 or not result_file.exists():
            raise JobFailed(f"the engine ended with status {status}\n{_tail(log_file)}")
        return JobResult.from_json(result_file.read_text())

    def _start(self, runner: str) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("engine_process.py")
        return subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self._directory / "engine_process.err").open("a"),
            env=os.environ | ENGINE_ENV | runners.environment(runner),
            text=True,
            bufsize=1,
        )

    def _read(self, pipe: IO[str], deadline: float, log_file: Path, group: int | None = None) -> int:
        """The next number that the engine process prints; JobFailed if there is none by the deadline."""
        readable, _, _ = select.select([pipe], [], [], deadline)
        line = pipe.readline() if readable else ""
        if line:
            return int(line)
        if group is not None:
            _kill_group(group, grace=0.0)
        self._stop()
        problem = "the engine process died" if readable else f"no answer within {deadline:g} s"
        errors = (self._directory / "engine_process.err").read_text()[-2000:]
        raise JobFailed(f"{problem}\n{errors}\n{_tail(log_file)}")

    def _stop(self) -> None:
        while self._processes:
            _, process = self._processes.popitem()
            process.kill()
            process.wait()


def _kill_group(group: int, grace: float) -> bool:
    """Whether processes of the group are still there after `grace` seconds; kills them if so."""
    end = time.monotonic() + grace
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        if time.monotonic() >= end:
            os.killpg(group, signal.SIGKILL)
            return True
        time.sleep(0.05)


def _tail(log_file: Path, lines: int = 60) -> str:
    return "\n".join(log_file.read_text(errors="replace").splitlines()[-lines:])
