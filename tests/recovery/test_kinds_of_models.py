"""Models of every kind give stock vLLM's tokens whatever happens to the engine meanwhile.

Lanes change at random, requests are preempted, and a worker is lost, in each partition; layers of several kinds on both
model runners. Each step, as the attention workers are told of it, is the one that vLLM's own tensors describe.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import runners
from comparison import FLOAT32_TOLERANCE, assert_same
from engines import Engines
from hybrid_specs import HYBRID
from jobs import Job, JobResult, Phase, Request
from losing import Scene, wait_for_steps
from model_specs import LATENT, LAYERED_ON, NEEDS_TRITON, PLAIN_ROTARY, TOLERANCES
from models import ModelZoo
from multimodal_models import MULTIMODAL
from multimodal_spec import AUDIO, BEGIN, END, mark
from workloads import greedy, prompt, requests, sampled

PREFIX = prompt(150, seed=7)

LATENT_ON = [("deepseek_v3", runners.V1), ("deepseek_v3", runners.V2)]
HYBRIDS = [family for family in HYBRID if family != "lfm2_one_state"]
FAMILIES = [
    *LAYERED_ON,
    *LATENT_ON,
    ("qwen2_audio", runners.V1),
    *((family, runner) for family in HYBRIDS for runner in (runners.V1, runners.V2)),
]

ONE_GROUP = ("bloom", "falcon_alibi", "deepseek_v3", "qwen2_audio", "lfm2")
WINDOWS_ALONE = ("mistral_window", "phi3_window", "starcoder2")
LONGER_BLOCKS = ("falcon_h1", "granitemoehybrid", "nemotron_h")
FEW_BLOCKS = (
    dict.fromkeys(ONE_GROUP, 20)
    | dict.fromkeys(WINDOWS_ALONE, 9)
    | dict.fromkeys(LONGER_BLOCKS, 7)
    | {"llama4": 46, "mimo_v2": 15}
)
"""KV blocks that do not hold all requests; 40 for the others."""

ONE_KV_HEAD = {"falcon_alibi"}

PARTITIONS = {"head": "shm", "sequence": "shm", "request": "ucx"}
"""And the transport to their workers."""


def marked(cases: list[tuple[str, ...]], always: set[tuple[str, ...]]) -> list[object]:
    """Those that are run always, and the others, which take minutes."""
    return [pytest.param(*case, marks=[pytest.mark.slow] * (case not in always)) for case in cases]


def heard(*seconds: float) -> list[Request]:
    """Requests with sounds in prompts of several chunks."""
    sounds = [([int(16_000 * length)], seed) for seed, length in enumerate(seconds)]
    marks = [mark(BEGIN), mark(AUDIO), mark(END)]
    return [
        Request(prompt(60, seed) + marks + prompt(70, seed), greedy(48), media={"audio": [sound]})
        for seed, sound in enumerate(sounds)
    ]


@pytest.fixture
def job(model_zoo: ModelZoo, family: str, runner: str) -> Job:
    """Prompts across windows and in several chunks, at once and one by one, and one with a seed, which stock vLLM must
    not cut; then one whose beginning is cached.
    """
    # A worker is lost long before the longest ends, whose steps are quick.
    lengths, tokens, longest = (1, 33, 129, 300), 48, 300 if runner == runners.V1 else 48
    if family in NEEDS_TRITON:  # stock vLLM's attention is interpreted too
        lengths, tokens, longest = (61, 189), 12, 12
    later = [Request(PREFIX + prompt(i, seed=i), greedy(tokens), after_step=4 * i) for i in range(3)]
    seeded = Request(prompt(40, seed=3), sampled(tokens, seed=5))
    together = [seeded, *requests(lengths, tokens), *later, *requests((20,), longest, seed=50)]
    if family in MULTIMODAL:
        together += heard(1.0, 0.3)
    phases = [
        Phase("together", together),
        Phase("afterwards", [Request(PREFIX + prompt(9, seed=9), greedy(8))]),
    ]
    engine = {"max_model_len": 384, "max_num_batched_tokens": 96, "max_num_seqs": 16, "block_size": 32}
    if family in (*LATENT, *HYBRID):
        engine |= {"compilation_config": PLAIN_ROTARY}
    if family in HYBRID:
        engine |= {"enable_prefix_caching": False}
    return Job(model_zoo(family), phases, engine, runner=runner)


@pytest.fixture
def stock(engines: Engines, job: Job, family: str) -> JobResult:
    # Its own attention for CPUs attends latent rows in prompts that are not cut.
    uncut = {"max_num_batched_tokens": 1024} if family in LATENT else {}
    return engines.run(replace(job, engine=job.engine | uncut))


@pytest.mark.parametrize(("family", "runner"), marked(FAMILIES, always={("gpt_oss", runners.V1)}))
def test_preempted(engines: Engines, stock: JobResult, job: Job, family: str) -> None:
    num_blocks = {"num_gpu_blocks_override": FEW_BLOCKS.get(family, 40)}
    lamina = replace(job, executor="lamina", random_lanes=0, engine=job.engine | num_blocks)
    result = engines.run(lamina)
    assert_same(stock, result, TOLERANCES.get(family, FLOAT32_TOLERANCE))
    assert result.phase("together").preemptions > 0
    assert result.counts["lane changes"] > 0
    assert result.counts["checked steps"] > 20


@pytest.mark.parametrize(
    ("family", "runner", "partition"),
    marked(
        [
            (*case, partition)
            for case in FAMILIES
            for partition in PARTITIONS
            if partition != "head" or case[0] not in ONE_KV_HEAD
        ],
        always={("llama4", runners.V1, "request"), ("gemma4_shared", runners.V2, "sequence")},
    ),
)
def test_spare_takes_its_place(scene: Scene, stock: JobResult, job: Job, family: str, partition: str) -> None:
    """Of one of two workers, whose pools differ where they may."""
    workers = [
        scene.start(memory="64MiB" if partition == "head" else memory) for memory in ("64MiB", "48MiB")
    ]
    spare = scene.start()

    def lose() -> None:
        wait_for_steps(workers[1].address, 8)
        scene.kill(workers[1])

    result = scene.run(
        lose,
        replace(job, random_lanes=1),
        lamina_workers=scene.addresses(*workers),
        lamina_spares=spare.address,
        lamina_partition=partition,
        lamina_transport=PARTITIONS[partition],
    )
    assert_same(stock, result, TOLERANCES.get(family, FLOAT32_TOLERANCE))
    assert f"{spare.address} takes the place of {workers[1].address}" in scene.log
    assert result.counts["lane changes"] > 0
    assert result.counts["checked steps"] > 20
