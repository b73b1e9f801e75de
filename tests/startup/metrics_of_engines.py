"""Starts engines one after the other in this process, and says what `LLM.get_metrics` shows of Lamina for each.

    metrics_of_engines.py MODEL RESULTS ENGINES

ENGINES is a JSON list: for each engine keyword arguments of LLM, and how many tokens its workers will have appended in
all layers, 0 where that is not counted. With the metrics comes which modules of Lamina's executor are imported by then.
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
DEADLINE = 60.0


def main(model: str, results: str, engines: str) -> None:
    found = []
    for engine, tokens in json.loads(engines):
        metrics = run(model, engine, tokens)
        found.append([metrics, [name for name in sys.modules if name.startswith("vllm_lamina.executor")]])
    Path(results).write_text(json.dumps(found))


def run(model: str, engine: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """Name, labels and value (of a histogram the count) of each metric of Lamina after some requests."""
    llm = LLM(model, **COMMON | engine)
    prompts = [{"prompt_token_ids": [4 + (7 * i + n) % 1000 for i in range(150)]} for n in range(4)]
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True), use_tqdm=False)
    found = settled_metrics(tokens)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return found


def settled_metrics(tokens: int) -> list[dict[str, Any]]:
    """When the workers, which are asked once a second, have all answered and told of so many tokens."""
    end = time.monotonic() + DEADLINE
    while True:
        found = lamina_metrics()
        counted, workers, up = (
            total(found, name) for name in ("worker_tokens_appended", "workers", "workers_up")
        )
        if (counted == tokens and up == workers) or time.monotonic() > end:
            return found
        time.sleep(0.1)


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
