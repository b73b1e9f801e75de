"""Starts engines one after the other in this process, and says what `LLM.get_metrics` shows of Lamina for each.

    metrics_of_engines.py MODEL RESULTS ENGINES

ENGINES is a JSON list with keyword arguments of LLM for each engine.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Histogram, get_metrics_snapshot

COMMON = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "gpu_memory_utilization": 0.1}
POLLED_SECONDS, DEADLINE = 2.5, 60.0


def main(model: str, results: str, engines: str) -> None:
    Path(results).write_text(json.dumps([run(model, engine) for engine in json.loads(engines)]))


def run(model: str, engine: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, labels and value (of a histogram the count) of each metric of Lamina after some requests."""
    llm = LLM(model, **COMMON | engine)
    prompts = [{"prompt_token_ids": [4 + (7 * i + n) % 1000 for i in range(150)]} for n in range(4)]
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True), use_tqdm=False)
    found = settled_metrics()
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return found


def settled_metrics() -> list[dict[str, Any]]:
    """When the workers, which are asked once a second, have all answered last and count no more tokens."""
    tokens, end = 0, time.monotonic() + DEADLINE
    while True:
        time.sleep(POLLED_SECONDS)
        found = lamina_metrics()
        counted, workers, up = (total(found, name) for name in ("tokens_appended", "workers", "workers_up"))
        if not found or (counted == tokens > 0 and up == workers) or time.monotonic() > end:
            return found
        tokens = counted


def total(metrics: list[dict[str, Any]], name: str) -> float:
    return sum(metric["value"] for metric in metrics if metric["name"].endswith(f"_{name}"))


def lamina_metrics() -> list[dict[str, Any]]:
    return [
        {
            "name": metric.name,
            "labels": metric.labels,
            "value": metric.count if isinstance(metric, Histogram) else metric.value,
        }
        for metric in get_metrics_snapshot()
        if "lamina" in metric.name
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
