"""Blocks that vLLM zeroes or copies in a step are zeroed and copied on the attention worker.

vLLM 0.32 does so for models that Lamina refuses, so the step is made by hand here: the KV blocks of a finished request
are copied and zeroed behind the prefix cache's back, and a request that hits them must notice, or not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from engines import ENGINE_DEFAULTS, ENGINE_ENV
from models import ModelZoo

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import SchedulerOutput

llm = LLM(**json.loads(sys.argv[1]))
worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
prompt = {"prompt_token_ids": [7 + 3 * i % 900 for i in range(300)]}

def generate():
    (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    return list(output.outputs[0].token_ids)

def step(**operations):
    output = SchedulerOutput.make_empty()
    for name, value in operations.items():
        setattr(output, name, value)
    worker.execute_model(output)

pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
found = {"first": generate(), "again": generate()}
cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
spare = [block.block_id for block in pool.blocks if block.block_hash is None and not block.is_null][-len(cached):]
step(kv_cache_block_copies=[KVCacheBlockCopy(a, b) for a, b in zip(cached, spare)])
step(new_block_ids_to_zero=cached)
found["zeroed"] = generate()
step(kv_cache_block_copies=[KVCacheBlockCopy(b, a) for a, b in zip(cached, spare)])
found["restored"] = generate()
print("FOUND " + json.dumps(found))
"""


def test_zeroed_and_restored_blocks(model_zoo: ModelZoo) -> None:
    options = {
        "model": model_zoo("llama"),
        "executor": "lamina",
        "lamina_memory": "64MiB",
        **ENGINE_DEFAULTS,
    }
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(options)],
        env=os.environ | ENGINE_ENV,
        capture_output=True,
        text=True,
        timeout=180,
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, finished.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["again"] == found["first"]
    assert found["zeroed"] != found["first"]
    assert found["restored"] == found["first"]
