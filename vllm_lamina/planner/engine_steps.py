"""Times the decode steps of a real engine, stock vLLM or Lamina, in a process of its own.

``python -m vllm_lamina.planner.engine_steps REQUEST.json RESULT.json``; `measure_steps` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_lamina import run_module
from vllm_lamina.errors import LaminaError
from vllm_lamina.units import parse_cpus

WARM_UP_STEPS = 3


class MeasurementFailed(LaminaError):
    """The engine to be measured did not start or did not finish; the end of its log is given."""


@dataclass(frozen=True)
class Case:
    """Decoding with a constant batch: sequences, and cached tokens of each at the start."""

    batch: int
    context: int


@dataclass(frozen=True)
class Measurement:
    """Seconds of the steps of one case: lower quartile and median.

    The lower quartile is what a machine that other work shares does when it is left alone; on a quiet one it
    equals the median.
    """

    batch: int
    context: int
    quartile: float
    median: float


def measure_steps(
    model: Path,
    cases: list[Case],
    *,
    batches: int,
    model_cpus: str,
    worker_cpus: str,
    steps: int = 24,
    random_weights: bool = True,
    max_context: int = 8192,
    deadline: float = 600.0,
) -> list[Measurement]:
    """Run an engine on a model directory and time the steps of each case.

    Parameters
    ----------
    batches
        0 for stock vLLM; Lamina's batches in flight, 1 or 2.
    model_cpus, worker_cpus
        CPU lists, as ``0`` or ``0-3``.
    steps
        Decode steps to time in each case.

    Raises
    ------
    MeasurementFailed
        The engine ended with an error, or did not end in time.
    """
    request = {
        "model": str(model),
        "cases": [asdict(case) for case in cases],
        "batches": batches,
        "worker_cpus": worker_cpus,
        "steps": steps,
        "random_weights": random_weights,
        "max_context": max_context,
    }
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": model_cpus,
        "OMP_NUM_THREADS": str(len(parse_cpus(model_cpus))),
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, name) for name in ("request.json", "result.json", "log")]
        paths[0].write_text(json.dumps(request))
        command = [*run_module.command("vllm_lamina.planner.engine_steps"), *map(str, paths[:2])]
        with paths[2].open("w") as log:
            try:
                status = subprocess.run(
                    command, env=environment, stdout=log, stderr=log, timeout=deadline, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = -1
        if status != 0:
            tail = paths[2].read_text().splitlines()[-15:]
            raise MeasurementFailed(
                f"the engine on {model} did not finish its measurement:\n" + "\n".join(tail)
            )
        return [Measurement(**row) for row in json.loads(paths[1].read_text())]


def _engine(request: dict[str, Any]) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {}
    if request["batches"]:
        options = {
            "executor": "lamina",
            "lamina_worker_cpus": request["worker_cpus"],
            "lamina_batches": request["batches"],
            "lamina_stagger": "always",
        }
    llm = LLM(
        request["model"],
        load_format="dummy" if request["random_weights"] else "auto",
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=request["max_context"],
        enable_prefix_caching=False,
        kv_cache_memory_bytes=3 << 30,
        seed=0,
        **options,
    )
    return llm.llm_engine


def _time_case(engine: Any, case: Case, steps: int, name: str) -> Measurement:
    import numpy as np
    from vllm import SamplingParams

    random = np.random.default_rng(case.batch * 100_000 + case.context)
    # Prompts come in over several steps; requests that came first must still run when the last one has.
    prefill_steps = case.batch * case.context // 2048 + case.batch // 64 + 2
    sampling = SamplingParams(
        max_tokens=steps + WARM_UP_STEPS + prefill_steps, ignore_eos=True, temperature=0.0, detokenize=False
    )
    for index in range(case.batch):
        tokens = random.integers(10, 1000, case.context).tolist()
        engine.add_request(f"{name}-{index}", {"prompt_token_ids": tokens}, sampling)
    # A round gives every sequence a token: one step of the engine, or one of each batch in flight.
    times: list[float] = []
    decoding: set[str] = set()
    tokens, start = 0, time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if any(output.finished for output in outputs):
            break
        decoding.update(output.request_id for output in outputs if output.outputs)
        tokens = tokens + len(outputs) if len(decoding) == case.batch else 0
        if tokens >= case.batch or tokens == 0:
            now = time.perf_counter()
            if tokens:
                times.append(now - start)
            tokens, start = 0, now
    while engine.has_unfinished_requests():
        engine.step()
    times = times[WARM_UP_STEPS:][:steps]
    quartile, median = np.quantile(times, [0.25, 0.5])
    return Measurement(case.batch, case.context, float(quartile), float(median))


def main() -> None:
    """Measure what the request file asks for."""
    request = json.loads(Path(sys.argv[1]).read_text())
    engine = _engine(request)
    results = [
        asdict(_time_case(engine, Case(**row), request["steps"], f"case{index}"))
        for index, row in enumerate(request["cases"])
    ]
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
