"""`vllm bench serve` on the real model, while the embedded attention worker is killed and stopped: no request fails."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from server import SERVER_ENV, VllmServer
from victims import EmbeddedVictim

SEED = 1
NUM_PROMPTS = 30
REQUESTS_PER_SECOND = 1.0
STOPPED_FOR = 4.0
TOKENS_BETWEEN = 100
"""Generated from one disturbance to the next, at least."""

BENCHMARK = (
    "--dataset-name",
    "random",
    "--random-input-len",
    "200",
    "--random-output-len",
    "48",
    "--ignore-eos",
)
DEADLINE = 900.0


@pytest.mark.long_chaos
@pytest.mark.timeout(1500)
def test_no_request_fails(real_model: Path, tmp_path: Path) -> None:
    """In float32, fast on any CPU, and eager, quick to start. Prints what happened, and the benchmark's report."""
    engine = ("--executor", "lamina", "--lamina-memory", "512MiB", "--max-model-len", "2048")
    engine += (
        "--enforce-eager",
        "--dtype",
        "float32",
        "--gpu-memory-utilization",
        "0.2",
        "--max-num-batched-tokens",
        "512",
        "--served-model-name",
        "SmolLM2",
    )
    with VllmServer(str(real_model), *engine, directory=tmp_path) as server:
        log = tmp_path / "bench.log"
        vllm = str(Path(sys.executable).with_name("vllm"))
        command = [vllm, "bench", "serve", "--backend", "openai", "--base-url", server.url]
        command += ["--model", "SmolLM2", "--tokenizer", str(real_model), *BENCHMARK, "--seed", str(SEED)]
        command += ["--num-prompts", str(NUM_PROMPTS), "--request-rate", str(REQUESTS_PER_SECOND)]
        with (
            log.open("w") as output,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | SERVER_ENV,
            ) as benchmark,
        ):
            try:
                happened = disturb_until_it_ends(benchmark, server, log)
            finally:
                benchmark.kill()
        report = log.read_text(errors="replace")
        print("\n".join(happened), report[report.find("====") :], sep="\n")
        assert benchmark.returncode == 0, report[-4000:]
        assert number("Successful requests", report) == NUM_PROMPTS
        assert number("Failed requests", report) == 0
        kinds = {line.split()[2] for line in happened}
        assert kinds == {"killed", "stopped"}, happened
        server.get("health")


def disturb_until_it_ends(benchmark: subprocess.Popen[bytes], server: VllmServer, log: Path) -> list[str]:
    """What was done to the worker, and when: seconds since the benchmark began to ask."""
    rng = random.Random(SEED)
    worker = EmbeddedVictim(server)
    end = time.monotonic() + DEADLINE
    while benchmark.poll() is None and server.metric("num_requests_running") == 0:
        assert time.monotonic() < end, log.read_text(errors="replace")[-4000:]
        time.sleep(0.2)
    start, happened = time.monotonic(), []
    kill, tokens = True, 0.0
    while not wait(benchmark, rng.uniform(0.5, 5.0)):
        assert time.monotonic() < end, log.read_text(errors="replace")[-4000:]
        # A worker that is lost again before a step is done would only say how slow this machine is.
        if server.metric("generation_tokens_total") < tokens + TOKENS_BETWEEN:
            continue
        when = f"{time.monotonic() - start:6.1f} s"
        if kill:
            happened.append(f"{when} killed{'' if worker.kill() else ': no worker there'}")
        else:
            happened.append(f"{when} stopped for {STOPPED_FOR:g} s")
            paused = worker.pause()
            wait(benchmark, STOPPED_FOR)
            paused.resume()
        kill, tokens = not kill, server.metric("generation_tokens_total")
    return happened


def wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process has ended within so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def number(name: str, report: str) -> int:
    [found] = re.findall(rf"^{name}: +(\d+)", report, re.MULTILINE)
    return int(found)
