"""Requests keep their tokens while one lane or two are in use by turns, whatever the lanes' input batches still hold.

Where requests may move they go from lane to lane and back again; elsewhere they enter either, and come back to it when
they were preempted. Whatever a request can ask for is among them: no state behind it is lost. And each step, as the
attention workers are told of it by the scheduler's output alone, is the one that vLLM's own tensors describe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from engines import ENGINE_DEFAULTS, ENGINE_ENV
from models import ATTENTION_MODULES, MLP_MODULES, ModelZoo, create_adapter

PROGRAM = """
import json, random, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm_lamina.attention_backend.metadata import LaminaMetadataBuilder
from vllm.v1.core.sched.scheduler import Scheduler
from vllm_lamina.scheduler.lanes import Lanes
from vllm_lamina.scheduler.scheduler import LaminaScheduler

rng = random.Random(0)
changes = preempted = 0

def choose_at_random(self, expected):
    # An adversarial schedule: one lane or two, changing every few steps.
    global changes
    if len(expected) < 2:
        return 1
    chosen = rng.choice([1, 2]) if rng.random() < 0.2 else self._in_use
    changes += chosen != self._in_use
    return chosen

Lanes._choose_number = choose_at_random
preempt = Scheduler._preempt_request

def preempt_and_count(self, *args, **kwargs):
    global preempted
    preempted += isinstance(self, LaminaScheduler)
    preempt(self, *args, **kwargs)

Scheduler._preempt_request = preempt_and_count
build = LaminaMetadataBuilder.build
checked = 0

def build_and_check(self, common_prefix_len, theirs, fast_build=False):
    # What the scheduler says of the step is what vLLM's own tensors say.
    global checked
    metadata = build(self, common_prefix_len, theirs, fast_build)
    if metadata.step is not None:
        step, n = metadata.step, theirs.num_reqs
        assert step.num_tokens == theirs.num_actual_tokens
        assert step.query_lens.tolist() == theirs.query_start_loc_cpu[: n + 1].diff().tolist()
        assert (step.context_lens + step.query_lens).tolist() == theirs.seq_lens[:n].tolist()
        assert step.slot_mapping.tolist() == theirs.slot_mapping[: step.num_tokens].tolist()
        for ours, row, length in zip(step.block_table, theirs.block_table_tensor, theirs.seq_lens, strict=False):
            used = -(-int(length) // self.kv_cache_spec.block_size)
            assert ours[:used].tolist() == row[:used].tolist()
        checked += 1
    return metadata

LaminaMetadataBuilder.build = build_and_check
model, adapters, options, lamina = json.loads(sys.argv[1])
prefix = [4 + 11 * i % 900 for i in range(150)]
prompts = [[4 + (7 * i + n) % 900 for i in range(n)] for n in (3, 40, 130, 200)] + [prefix + [9], prefix + [5, 6]]
digits = StructuredOutputsParams(regex="([0-9]{1,9} ){40}")
asked = [
    dict(repetition_penalty=1.1, presence_penalty=0.5),
    dict(temperature=1.0, seed=3, top_k=40),
    dict(structured_outputs=digits, ignore_eos=False, max_tokens=300),
    dict(logit_bias={50: 4.0, 60: 3.5}, bad_words=["a", "b"], allowed_token_ids=list(range(4, 600))),
    dict(ignore_eos=False, temperature=1.0, seed=4, logit_bias={2: 8.0}, min_tokens=150),
    dict(),
]
default = dict(temperature=0, ignore_eos=True)
params = [SamplingParams(**default | dict(max_tokens=60 + 40 * i) | more) for i, more in enumerate(asked)]
requests = [LoRARequest(f"adapter-{i}", i + 1, path) for i, path in enumerate(adapters)]
loras = [requests[0], None, requests[1], requests[1], None, requests[0]]

def generate(**engine):
    llm = LLM(model, **options, **engine)
    prompts_ = [{"prompt_token_ids": p} for p in prompts]
    outputs = llm.generate(prompts_, params, use_tqdm=False, lora_request=loras)
    llm.llm_engine.engine_core.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]

found = {"stock": generate(kv_cache_memory_bytes=64 << 20), "lamina": generate(**lamina)}
print("FOUND " + json.dumps(found | {"changes": changes, "preempted": preempted, "checked": checked}))
"""


def test_lanes_change_at_random(model_zoo: ModelZoo, tmp_path: Path) -> None:
    model = model_zoo("llama")
    adapters = [
        str(create_adapter(Path(model), tmp_path / f"adapter-{i}", 4, modules, seed=i))
        for i, modules in enumerate([ATTENTION_MODULES, MLP_MODULES])
    ]
    # One slot more than adapters: see test_lora.py.
    options = ENGINE_DEFAULTS | {"enable_lora": True, "max_loras": 3}
    lamina = {"executor": "lamina", "lamina_memory": "2MiB"}  # not enough for all
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([model, adapters, options, lamina])],
        env=os.environ | ENGINE_ENV,
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, finished.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["changes"] > 10
    assert found["preempted"] > 0
    assert found["checked"] > 300
    assert found["lamina"] == found["stock"]
