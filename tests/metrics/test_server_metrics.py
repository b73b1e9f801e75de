"""A running server's `/metrics`: names, types, labels, and values that agree with what the requests must cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from exposition import PREFIX, Scrape
from model_specs import SUPPORTED
from models import ModelZoo
from serving import MAX_TOKENS, MODEL, PROMPT_LEN, Serving, serving_with_a_worker
from worker_processes import cli

from vllm_lamina.metrics.definitions import METRICS, STATES

REQUESTS = 3

CONFIG = SUPPORTED["llama"].config
LAYERS, HEAD_BYTES = CONFIG["num_hidden_layers"], CONFIG["head_dim"] * 4
Q_BYTES, KV_BYTES = CONFIG["num_attention_heads"] * HEAD_BYTES, CONFIG["num_key_value_heads"] * HEAD_BYTES


@pytest.fixture(scope="module")
def serving(model_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    directory = tmp_path_factory.mktemp("server")
    with serving_with_a_worker(model_zoo("llama"), directory, "--lamina-stagger", "always") as serving:
        yield serving


@pytest.fixture(scope="module")
def idle(serving: Serving) -> Scrape:
    """Before the first request."""
    return serving.scrape_when(lambda scrape: scrape.value("workers_up") == 1)


@pytest.fixture(scope="module")
def served(serving: Serving, idle: Scrape) -> Scrape:
    """After `REQUESTS` requests, one after the other."""
    for _ in range(REQUESTS):
        serving.complete()
    steps = REQUESTS * MAX_TOKENS
    return serving.scrape_when(lambda scrape: scrape.value("worker_steps_total") >= steps)


def test_a_worker_is_up_before_the_first_request(serving: Serving, idle: Scrape) -> None:
    assert idle.value("workers") == 1
    assert idle.value("worker_up", worker=serving.worker.address) == 1
    assert idle.value("worker_kv_cache_bytes") > 0
    assert idle.value("steps_total") == 0


def test_names_types_and_labels(serving: Serving, served: Scrape) -> None:
    """What is exposed is what is declared, which the documentation and the dashboard are compared with."""
    assert served.types == {PREFIX + metric.name: metric.kind for metric in METRICS}
    for metric in METRICS:
        suffix = {"gauge": "", "counter": "_total", "histogram": "_count"}[metric.kind]
        assert served.label_names(metric.name + suffix) == {"model_name", "engine", *metric.labels}
        [labels, *_] = served.samples[PREFIX + metric.name + suffix]
        assert {("model_name", MODEL), ("engine", "0")} <= labels
        assert not metric.labels or ("worker", serving.worker.address) in labels


def test_steps_and_tokens(served: Scrape) -> None:
    steps = REQUESTS * MAX_TOKENS
    assert served.value("steps_total") == served.value("worker_steps_total") == steps
    # The last token of a request is sampled, and never fed.
    tokens = REQUESTS * (PROMPT_LEN + MAX_TOKENS - 1)
    assert served.value("worker_tokens_appended_total") == LAYERS * tokens


def test_bytes_are_those_of_the_formula(served: Scrape) -> None:
    """A decode carries q, k, v and the output; a prompt without context k and v alone."""
    decodes, prompts = REQUESTS * (MAX_TOKENS - 1), REQUESTS * PROMPT_LEN
    there = LAYERS * (decodes * (Q_BYTES + 2 * KV_BYTES) + prompts * 2 * KV_BYTES)
    back = LAYERS * decodes * Q_BYTES
    assert there < served.value("worker_received_bytes_total") < 1.05 * there
    assert back < served.value("worker_sent_bytes_total") < 1.1 * back


def test_one_wait_for_each_layer_that_has_an_output(served: Scrape) -> None:
    count = served.value("exchange_wait_seconds_count")
    assert count == LAYERS * REQUESTS * (MAX_TOKENS - 1)
    assert served.value("exchange_wait_seconds_bucket", le="+Inf") == count
    assert 1e-6 < served.value("exchange_wait_seconds_sum") / count < 0.1


def test_where_the_time_went(serving: Serving, served: Scrape) -> None:
    assert served.value("model_worker_busy_seconds_total") > 0
    assert served.value("worker_seconds_total", state="attending") > 0
    assert served.value("worker_seconds_total", state="appending") > 0

    def total(scrape: Scrape) -> float:
        return sum(scrape.value("worker_seconds_total", state=state) for state in STATES)

    # While nothing happens it idles, and the times go on.
    later = serving.scrape_when(lambda scrape: total(scrape) > total(served) + 1)
    idle = later.value("worker_seconds_total", state="idle") - served.value(
        "worker_seconds_total", state="idle"
    )
    assert idle == pytest.approx(total(later) - total(served), rel=0.05)


def test_nothing_went_wrong(served: Scrape) -> None:
    for name in ("recoveries", "requests_recomputed", "tokens_recomputed"):
        assert served.value(f"{name}_total") == 0
    for name in ("rejected_frames", "refused_clients"):
        assert served.value(f"worker_{name}_total") == 0


def test_a_client_without_the_secret_is_counted(serving: Serving, served: Scrape) -> None:
    assert cli("worker", "stats", serving.worker.address).returncode == 1
    serving.scrape_when(lambda scrape: scrape.value("worker_refused_clients_total") > 0)


def test_two_batches_and_the_kv_pool_in_use(serving: Serving, served: Scrape) -> None:
    assert served.value("batches_in_flight") == 0
    assert served.value("worker_kv_cache_usage_perc") == 0
    began = time.monotonic()
    seen = threading.Event()

    def keep_asking(prompt_len: int) -> None:
        while not seen.is_set():
            serving.complete(prompt_len, 400)

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(keep_asking, PROMPT_LEN + i) for i in range(4)]
        try:
            busy = serving.scrape_when(lambda scrape: scrape.value("batches_in_flight") == 2)
        finally:
            seen.set()
        assert 0 < busy.value("worker_kv_cache_usage_perc") <= 1
        for client in clients:
            client.result(timeout=120)
    after = serving.scrape_when(lambda scrape: scrape.value("batches_in_flight") == 0)
    # The model worker computes for one batch at a time, or waits, or has no step.
    took = sum(
        after.value(name) - served.value(name)
        for name in ("model_worker_busy_seconds_total", "exchange_wait_seconds_sum")
    )
    assert 0 < took <= 1.02 * (time.monotonic() - began)


def test_a_worker_that_died_is_not_up_though_no_step_runs(serving: Serving, served: Scrape) -> None:
    """The last test: the engine does not outlive its worker's KV blocks."""
    serving.worker.process.kill()
    lost = serving.scrape_when(lambda scrape: scrape.value("workers_up") == 0)
    assert lost.value("worker_up", worker=serving.worker.address) == 0
    assert lost.value("worker_heartbeat_misses_total") > 0
    assert lost.value("workers") == 1
