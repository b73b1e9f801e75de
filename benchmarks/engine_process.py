"""One vLLM engine that generates for the prompts it is sent and answers with what it measured.

Reads JSON lines from its standard input: first the keyword arguments of LLM, then one line per run. Answers each with
one JSON line. The whole engine is one process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``): its scheduler then uses no core
that the model worker or the attention worker does not know of.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

COUNTERS = ("steps", "messages", "bytes_in", "bytes_out", "ns_attending", "ns_appending")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM and its processes print belongs to the log

    from vllm import LLM

    llm = LLM(**json.loads(sys.stdin.readline()))
    print("{}", file=answers)
    for run, line in enumerate(sys.stdin):
        request = json.loads(line)
        if request.pop("fill"):
            fill_prefix_cache(llm, request["prompts"])
        print(json.dumps(measure(llm, run=run, **request)), file=answers)


def fill_prefix_cache(llm: Any, prompts: list[list[int]]) -> None:
    """Let vLLM's prefix cache hold the prompts, which have one length, without computing each: a benchmark of decoding
    would spend most of its time in prefill.

    The first prompt is computed. The other prompts' blocks are copies of its blocks, entered in the cache under their
    own hashes: each request reads its own memory with real numbers in it. What is generated from them means nothing.
    """
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate({"prompt_token_ids": prompts[0]}, params, use_tqdm=False)
    core = llm.llm_engine.engine_core.engine_core
    cache = core.scheduler.kv_cache_manager
    requests = [
        Request(f"fill-{i}", prompt, params, None, block_hasher=core.request_block_hasher)
        for i, prompt in enumerate(prompts)
    ]
    (computed,) = cache.get_computed_blocks(requests[0])[0].blocks
    pairs = []
    for request in requests[1:]:
        (hit,) = cache.get_computed_blocks(request)[0].blocks
        if len(hit) == len(computed):
            continue
        blocks = cache.block_pool.get_new_blocks(len(computed))
        block_size = core.scheduler.block_size
        cache.block_pool.cache_full_blocks(request, blocks, 0, len(blocks), block_size, 0)
        cache.block_pool.free_blocks(reversed(blocks))
        pairs += [(source.block_id, block.block_id) for source, block in zip(computed, blocks, strict=True)]
    if pairs:
        llm.collective_rpc(copy_blocks, args=(cache.block_pool.num_gpu_blocks, pairs))


def copy_blocks(worker: Any, num_blocks: int, pairs: list[tuple[int, int]]) -> None:
    """Copy KV blocks, (source, destination) each, where the worker has them."""
    from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

    if hasattr(worker, "exchange"):
        worker.attention_workers.client.copy_blocks(np.asarray(pairs, np.int32))
    else:
        copy_kv_cache_blocks_inplace(worker.model_runner.kv_caches, num_blocks, pairs)


def measure(
    llm: Any, run: int, prompts: list[list[int]], output_tokens: int, worker_pids: Sequence[int] = ()
) -> dict[str, Any]:
    """Runs all prompts together.

    ``decode_tokens_per_s`` counts the tokens between the moment when every request has its second token and the moment
    when the first one ends: all decode, at the full batch. Over the same time, ``tbt_p50_ms`` and ``tbt_p99_ms`` are
    times between the tokens of a request, ``attention_busy`` is the attention worker's part of the time at work (of
    several, their mean), and ``attention_workers`` what each worker's counters gained; for those whose process ids were
    given, ``cpu_s`` too, the time that their threads were on a CPU.
    ``output_tokens_per_s`` and ``mean_batch`` (requests that run) are over all of the run, prefill and tail included.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{run}-{i}", {"prompt_token_ids": prompt}, params)

    produced: dict[str, int] = {}
    last_token: dict[str, float] = {}
    gaps: list[float] = []
    all_gaps: list[float] = []
    batch_seconds = 0.0
    decode_begin = decode_end = 0.0
    tokens_at_begin = tokens_at_end = 0
    at_begin: list[dict[str, float]] = []
    at_end: list[dict[str, float]] = []
    before = begin
    while engine.has_unfinished_requests():
        batch = len(scheduler.running)
        outputs = engine.step()
        now = time.perf_counter()
        batch_seconds += batch * (now - before)
        before = now
        for output in outputs:
            produced[output.request_id] = len(output.outputs[0].token_ids)
            if output.request_id in last_token:
                all_gaps.append(now - last_token[output.request_id])
                if decode_begin and not decode_end:
                    gaps.append(all_gaps[-1])
            last_token[output.request_id] = now
        if not decode_begin and len(produced) == len(prompts) and min(produced.values()) > 1:
            decode_begin, tokens_at_begin = now, sum(produced.values())
            at_begin = attention_counters(llm, worker_pids)
        if not decode_end and any(output.finished for output in outputs):
            decode_end, tokens_at_end = now, sum(produced.values())
            at_end = attention_counters(llm, worker_pids)
    end = time.perf_counter()

    measured: dict[str, Any] = {
        "output_tokens_per_s": sum(produced.values()) / (end - begin),
        "mean_batch": batch_seconds / (end - begin),
        "all_tbt_p50_ms": 1000 * statistics.median(all_gaps),
        "all_tbt_p99_ms": 1000 * statistics.quantiles(all_gaps, n=100)[98],
    }
    if tokens_at_end > tokens_at_begin > 0:  # not where a backlog waits until the first ones have ended
        seconds = decode_end - decode_begin
        gained = [
            {name: end[name] - begin[name] for name in end}
            for begin, end in zip(at_begin, at_end, strict=True)
        ]
        busy = [(worker["ns_attending"] + worker["ns_appending"]) / 1e9 / seconds for worker in gained]
        measured |= {
            "decode_tokens": tokens_at_end - tokens_at_begin,
            "decode_tokens_per_s": (tokens_at_end - tokens_at_begin) / seconds,
            "tbt_p50_ms": 1000 * statistics.median(gaps),
            "tbt_p99_ms": 1000 * statistics.quantiles(gaps, n=100)[98],
            "attention_busy": statistics.fmean(busy) if busy else 0.0,
            "attention_workers": gained,
        }
    return measured


def attention_counters(llm: Any, pids: Sequence[int]) -> list[dict[str, float]]:
    """What each attention worker has done so far; nothing where there is none."""
    if "lamina" not in (llm.llm_engine.vllm_config.additional_config or {}):
        return []
    (workers,) = llm.collective_rpc("attention_worker_stats")
    counters = [{name: worker[name] for name in COUNTERS} for worker in workers]
    for worker, pid in zip(counters, pids, strict=False):
        worker["cpu_s"] = cpu_seconds(pid)
    return counters


def cpu_seconds(pid: int) -> float:
    """Time that a process's threads have been on a CPU."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


if __name__ == "__main__":
    main()
