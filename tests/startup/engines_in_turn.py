"""Starts engines one after the other in this process, and says what each generated and what it left behind.

    engines_in_turn.py MODEL RESULTS ENGINES

ENGINES is a JSON list with keyword arguments of LLM for each engine. An engine is dropped, as a user's program would
drop it, before the next one starts.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from in_turn import MAX_TOKENS, PROMPTS
from vllm import LLM, SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum

COMMON = {
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "gpu_memory_utilization": 0.1,
}


def main(model: str, results: str, engines: str) -> None:
    found = [state()] + [run(model, engine) for engine in json.loads(engines)]
    Path(results).write_text(json.dumps(found))


def run(model: str, engine: dict[str, Any]) -> dict[str, Any]:
    """What an engine generated, or why it did not start, and the state of the process when it is gone."""
    try:
        llm = LLM(model, **COMMON | engine)
    except Exception as error:  # whatever it is: the test compares its text
        return {"error": str(error)} | state()
    inputs = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "attention_workers_meanwhile": attention_workers(os.getpid()),
        "stats": llm.collective_rpc("attention_worker_stats") if "executor" in engine else [],
    }
    del llm, outputs
    gc.collect()
    return found | state()


def state() -> dict[str, Any]:
    """What engines change of a process, or start, and must give back."""
    return {
        "cpus": sorted(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "backend": AttentionBackendEnum.CPU_ATTN.get_path(),
        "attention_workers": attention_workers(os.getpid()),
    }


def attention_workers(pid: int) -> int:
    """How many attention workers are descendants of a process."""
    count = 0
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in _read(task).split():
            count += "vllm_lamina.worker.attention_worker" in _read(Path(f"/proc/{child}/cmdline"))
            count += attention_workers(int(child))
    return count


def _read(file: Path) -> str:
    """Empty where the thread or process has ended meanwhile."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
