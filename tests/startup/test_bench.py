"""`vllm bench` measures Lamina with `--executor lamina`, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_turn import IN_PROCESS
from models import ModelZoo
from programs import LAMINA, TINY_ENGINE, console, run, tail

# `bench latency` draws token ids below 10000.
RANDOM_WEIGHTS = ("--load-format", "dummy", "--hf-overrides", '{"vocab_size": 10240}')

SMALL = {
    "latency": "--input-len 8 --output-len 4 --batch-size 2 --num-iters-warmup 1 --num-iters 2",
    "throughput": "--dataset-name random --random-input-len 8 --random-output-len 4 --num-prompts 4",
}
MEASURED = {"latency": "Avg latency: ", "throughput": "Throughput: "}


@pytest.mark.parametrize("benchmark", [pytest.param("latency", marks=pytest.mark.slow), "throughput"])
def test_bench(model_zoo: ModelZoo, log: Path, benchmark: str) -> None:
    command = console("vllm", "bench", benchmark, *SMALL[benchmark].split(), *RANDOM_WEIGHTS)
    command += ["--model", model_zoo("llama"), *TINY_ENGINE, "--enforce-eager", *LAMINA]
    finished = run(command, log, **IN_PROCESS)
    assert finished.status == 0, tail(log)
    assert MEASURED[benchmark] in finished.output
    # The model worker has no KV blocks of its own: what was generated was attended by the attention worker.
    assert "attention worker: engine connected" in finished.output
    assert "0 B on the model worker" in finished.output
