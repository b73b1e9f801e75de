"""One vLLM engine that generates for the prompts it is sent and answers with what it measured.

Reads JSON lines from its standard input: first the keyword arguments of LLM, then one line per run. Answers each with
one JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM and its processes print belongs to the log

    from vllm import LLM

    llm = LLM(**json.loads(sys.stdin.readline()))
    print("{}", file=answers)
    for run, line in enumerate(sys.stdin):
        print(json.dumps(measure(llm, run=run, **json.loads(line))), file=answers)


def measure(llm: Any, run: int, prompts: list[list[int]], output_tokens: int) -> dict[str, float]:
    """Runs all prompts together.

    `decode_tokens_per_s` counts the tokens between the moment when every request has its first token and the moment
    when the first one ends: all decode, at the full batch. `total_tokens_per_s` counts prompt and output tokens from
    the arrival of the requests to the end of the last. `tbt_p50_ms` and `tbt_p99_ms` are times between the tokens of a
    request, and `attention_busy` is the attention worker's part of the time at work, both while all decode.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{run}-{i}", {"prompt_token_ids": prompt}, params)

    produced: dict[str, int] = {}
    decode_begin = decode_end = 0.0
    tokens_at_begin = tokens_at_end = 0
    last_token: dict[str, float] = {}
    gaps: list[float] = []
    attention_at_begin = attention = 0.0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            produced[output.request_id] = len(output.outputs[0].token_ids)
            if decode_begin and not decode_end:
                gaps.append(now - last_token[output.request_id])
            last_token[output.request_id] = now
        if not decode_begin and len(produced) == len(prompts):
            decode_begin, tokens_at_begin = now, sum(produced.values())
            attention_at_begin = attention_seconds(llm)
        if not decode_end and any(output.finished for output in outputs):
            decode_end, tokens_at_end = now, sum(produced.values())
            attention = attention_seconds(llm) - attention_at_begin
    end = time.perf_counter()

    if tokens_at_end <= tokens_at_begin:
        raise RuntimeError(
            "a request ended before the last one's prefill was done; ask for more output tokens"
        )
    return {
        "decode_tokens_per_s": (tokens_at_end - tokens_at_begin) / (decode_end - decode_begin),
        "tbt_p50_ms": 1000 * statistics.median(gaps),
        "tbt_p99_ms": 1000 * statistics.quantiles(gaps, n=100)[98],
        "attention_busy": attention / (decode_end - decode_begin),
        "total_tokens_per_s": (sum(map(len, prompts)) + sum(produced.values())) / (end - begin),
    }


def attention_seconds(llm: Any) -> float:
    """Seconds that the attention worker has been at work; 0 where there is none."""
    if "lamina" not in (llm.llm_engine.vllm_config.additional_config or {}):
        return 0.0
    (stats,) = llm.collective_rpc("attention_worker_stats")
    return float(stats["ns_attending"] + stats["ns_appending"]) / 1e9


if __name__ == "__main__":
    main()
