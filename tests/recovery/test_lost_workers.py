"""Attention workers are lost while an engine generates: every request ends with the tokens of stock vLLM."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import multimodal_requests
import pytest
import runners
from comparison import assert_same
from engines import Engines, JobFailed
from jobs import Job, JobResult, Phase, Request
from losing import Scene, embedded_worker, wait_for_steps
from models import ModelZoo
from worker_processes import pause, wait_until
from workloads import greedy, prompt, requests, sampled

PREFIX = prompt(300, seed=7)
OPTIONS = {"max_model_len": 2048, "max_num_batched_tokens": 512, "block_size": 32}


def phases(longest: int) -> list[Phase]:
    """Prompts longer than the token budget, requests that share a prefix and arrive one by one, seeds, several samples.

    The longest of them generates that many tokens.
    """
    return [
        Phase(
            "all at once",
            [
                *requests((1, 33, 129, 700), max_tokens=60),
                *requests((25,), max_tokens=longest, seed=60),
                *(Request(PREFIX + prompt(i, seed=i), greedy(60), after_step=2 * i) for i in range(4)),
                Request(prompt(40, seed=3), sampled(60, seed=5)),
                Request(prompt(50, seed=4), sampled(60, seed=6, n=2)),
            ],
        ),
        Phase("afterwards", [Request(PREFIX + prompt(9, seed=9), greedy(8)), *requests((40,), seed=30)]),
    ]


@pytest.fixture(scope="module")
def job(model_zoo: ModelZoo) -> Job:
    return Job(model_zoo("four_kv_heads"), phases(longest=400), OPTIONS)


@pytest.fixture(scope="module")
def long_job(job: Job) -> Job:
    """It goes on until a worker that is started again has joined."""
    return replace(job, phases=phases(longest=1900))


@pytest.fixture(scope="module")
def stock(engines: Engines, job: Job) -> JobResult:
    return engines.run(job)


@pytest.mark.parametrize(("batches", "kind"), [(2, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_embedded_worker(scene: Scene, stock: JobResult, batches: int, kind: signal.Signals) -> None:
    """It is started again; twice."""

    def lose() -> None:
        pid = 0
        for _ in range(2):
            pid, address = embedded_worker(after=pid)
            wait_for_steps(address, 20)
            os.kill(pid, kind)

    assert_same(stock, scene.run(lose, lamina_batches=batches))
    assert scene.log.count("attention workers complete again") >= 2


@pytest.mark.slow
def test_embedded_worker_with_the_v2_runner(scene: Scene, engines: Engines, job: Job) -> None:
    """It keeps the requests' states in one place for both lanes: what failed stands there where it stood."""
    seeded = Request(prompt(600, seed=3), sampled(12, seed=5))
    few = [Phase("few", [*requests((1, 33, 129), max_tokens=24), seeded, *requests((300,), max_tokens=24)])]
    job = replace(job, phases=few, runner=runners.V2)

    def lose() -> None:
        pid, address = embedded_worker()
        wait_for_steps(address, 6)
        os.kill(pid, signal.SIGKILL)

    assert_same(engines.run(job), scene.run(lose, job))
    assert "attention workers complete again" in scene.log


@pytest.mark.parametrize("family", ["qwen2_audio", pytest.param("llava", marks=pytest.mark.slow)])
def test_embedded_worker_of_a_multimodal_model(
    scene: Scene, engines: Engines, model_zoo: ModelZoo, family: str
) -> None:
    """What the encoder computed outlives the step that failed."""
    job = multimodal_requests.job(model_zoo, family)

    def lose() -> None:
        pid = 0
        for steps in (3, 5):
            pid, address = embedded_worker(after=pid)
            wait_for_steps(address, steps)
            os.kill(pid, signal.SIGKILL)

    assert_same(engines.run(job), scene.run(lose, job))
    assert scene.log.count("attention workers complete again") >= 2


@pytest.mark.slow
def test_spare_takes_its_place_on_streams(scene: Scene, engines: Engines, job: Job) -> None:
    """What two lanes have enqueued runs to its end for nothing, over memory that is given back only then."""
    few = [Phase("few", [*requests((1, 33, 70), max_tokens=12), *requests((40,), seed=3, max_tokens=12)])]
    engine = {"max_model_len": 256, "max_num_batched_tokens": 32, "block_size": 32, "max_num_seqs": 8}
    job = replace(job, phases=few, engine=engine, runner=runners.V2)
    worker, spare = scene.start(), scene.start()

    def lose() -> None:
        wait_for_steps(worker.address, 6)
        scene.kill(worker)

    workers = {"lamina_workers": worker.address, "lamina_spares": spare.address}
    result = scene.run(lose, replace(job, streams=True), **workers)
    assert_same(engines.run(job), result)
    assert f"{spare.address} takes the place of {worker.address}" in scene.log
    assert result.counts["layers on streams"] > 20


def test_embedded_worker_of_one_rank(scene: Scene, stock: JobResult) -> None:
    """Of two tensor-parallel ranks, which wait for each other in every layer."""

    def lose() -> None:
        pid, address = embedded_worker()
        wait_for_steps(address, 20)
        os.kill(pid, signal.SIGKILL)

    cpus = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    result = scene.run(lose, environment=cpus, tensor_parallel_size=2)
    assert_same(stock, result)
    assert "attention workers complete again" in scene.log


def test_comes_back_at_its_address(scene: Scene, stock: JobResult) -> None:
    worker = scene.start()

    def lose() -> None:
        wait_for_steps(worker.address, 20)
        scene.kill(worker)
        scene.start(worker.address)

    assert_same(stock, scene.run(lose, lamina_workers=worker.address, lamina_transport="ucx"))
    assert "attention workers complete again" in scene.log


def test_paused_worker_goes_on(scene: Scene, stock: JobResult) -> None:
    """It still holds the engine's old pool, which it gives up for a new one."""
    worker = scene.start()

    def lose() -> None:
        wait_for_steps(worker.address, 20)
        pause(worker.process.pid)
        wait_until(lambda: "is lost: it has not answered" in scene.log)
        os.kill(worker.process.pid, signal.SIGCONT)

    assert_same(stock, scene.run(lose, lamina_workers=worker.address))
    assert "attention workers complete again" in scene.log


@pytest.mark.parametrize(
    ("partition", "transport"),
    [("head", "ucx"), ("sequence", "shm"), pytest.param("request", "ucx", marks=pytest.mark.slow)],
)
def test_spare_takes_its_place(scene: Scene, stock: JobResult, partition: str, transport: str) -> None:
    workers, small, spare = [scene.start() for _ in range(3)], scene.start(memory="4MiB"), scene.start()

    def lose() -> None:
        wait_for_steps(workers[1].address, 10)
        scene.kill(workers[1])

    options = {
        "lamina_workers": scene.addresses(*workers),
        "lamina_spares": scene.addresses(small, spare),
        "lamina_partition": partition,
        "lamina_transport": transport,
    }
    assert_same(stock, scene.run(lose, **options))
    assert f"{spare.address} takes the place of {workers[1].address}" in scene.log
    assert f"the attention worker at {small.address} cannot take the lost one's place" in scene.log


@pytest.mark.parametrize(
    ("partition", "batches"), [pytest.param("sequence", 1, marks=pytest.mark.slow), ("request", 2)]
)
def test_goes_on_without(scene: Scene, engines: Engines, long_job: Job, partition: str, batches: int) -> None:
    """With two of three workers; the third joins again later, without a pause."""
    workers = [scene.start() for _ in range(3)]

    def lose() -> None:
        wait_for_steps(workers[1].address, 10)
        scene.kill(workers[1])
        wait_until(lambda: "going on without" in scene.log)
        scene.start(workers[1].address)
        wait_until(lambda: "attention workers complete again" in scene.log)

    options = {
        "lamina_workers": scene.addresses(*workers),
        "lamina_partition": partition,
        "lamina_batches": batches,
    }
    assert_same(engines.run(long_job), scene.run(lose, long_job, **options))
    log = scene.log
    assert log.index("going on without") < log.index("attention workers complete again")
    if partition == "request":
        assert "12 of 12 running requests are recomputed" not in log


@pytest.mark.slow
@pytest.mark.parametrize(("batches", "runner"), [(2, runners.DEFAULT), (1, runners.DEFAULT), (2, runners.V2)])
def test_states_are_computed_anew_with_their_kv(
    scene: Scene, engines: Engines, model_zoo: ModelZoo, batches: int, runner: str
) -> None:
    """Also of requests that have lost no KV: a step that failed has moved the states of all its requests on."""
    engine = {"enable_prefix_caching": False, "max_num_batched_tokens": 208}
    few = [Phase("few", requests((1, 33, 129, 300, 600), max_tokens=40))]
    job = Job(model_zoo("falcon_h1"), few, engine, runner=runner)
    stock = engines.run(job)
    workers, spare = [scene.start(), scene.start()], scene.start()

    def lose() -> None:
        wait_for_steps(workers[1].address, 12)
        scene.kill(workers[1])

    options = {
        "lamina_workers": scene.addresses(*workers),
        "lamina_spares": spare.address,
        "lamina_partition": "request",
        "lamina_batches": batches,
    }
    assert_same(stock, scene.run(lose, job, **options))
    assert f"{spare.address} takes the place of {workers[1].address}" in scene.log


def test_nobody_takes_its_place(scene: Scene) -> None:
    worker = scene.start()

    def lose() -> None:
        wait_for_steps(worker.address, 20)
        scene.kill(worker)

    with pytest.raises(JobFailed, match=r"has not been replaced within 2 s \(--lamina-recovery-timeout\)"):
        scene.run(lose, lamina_workers=worker.address, lamina_recovery_timeout=2.0)
