"""Requests that go from lane to lane and back again keep their tokens, whatever the lanes' input batches still hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from engines import ENGINE_DEFAULTS, ENGINE_ENV
from models import ModelZoo

PROGRAM = """
import json, random, sys
from vllm import LLM, SamplingParams
from vllm_lamina.scheduler.staggered import StaggeredScheduler

rng = random.Random(0)
changes = 0

def choose_at_random(self):
    # An adversarial schedule: one lane or two, changing every few steps.
    global changes
    if rng.random() < 0.2:
        before, self._num_lanes = self._num_lanes, rng.choice([1, 2])
        changes += self._num_lanes != before
    if len(self.running) < 2:
        self._num_lanes = 1

StaggeredScheduler._choose_num_lanes = choose_at_random
model, options, lamina = json.loads(sys.argv[1])
prefix = [4 + 11 * i % 900 for i in range(150)]
prompts = [[4 + (7 * i + n) % 900 for i in range(n)] for n in (3, 40, 130, 200)] + [prefix + [9], prefix + [5, 6]]
params = [SamplingParams(temperature=0, max_tokens=60 + 40 * i, ignore_eos=True) for i in range(len(prompts))]

def generate(**engine):
    llm = LLM(model, **options, **engine)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]

found = {"stock": generate(kv_cache_memory_bytes=64 << 20), "lamina": generate(**lamina)}
print("FOUND " + json.dumps(found | {"changes": changes}))
"""


def test_lanes_change_at_random(model_zoo: ModelZoo) -> None:
    lamina = {"executor": "lamina", "lamina_memory": "64MiB"}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([model_zoo("llama"), ENGINE_DEFAULTS, lamina])],
        env=os.environ | ENGINE_ENV,
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, finished.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["changes"] > 10
    assert found["lamina"] == found["stock"]
