"""With several API servers, each of which is told a part, and `/metrics` shows the sum."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from model_specs import SUPPORTED
from models import ModelZoo
from serving import MAX_TOKENS, PROMPT_LEN, serving_with_a_worker

REQUESTS = 8
LAYERS = SUPPORTED["llama"].config["num_hidden_layers"]


@pytest.mark.slow
def test_nothing_is_counted_twice(model_zoo: ModelZoo, tmp_path: Path) -> None:
    """Requests at the same time reach both servers; each token is fed once, whichever server is told of its step."""
    with serving_with_a_worker(model_zoo("llama"), tmp_path, "--api-server-count", "2") as serving:
        with ThreadPoolExecutor(REQUESTS) as pool:
            for answer in [pool.submit(serving.complete, PROMPT_LEN, MAX_TOKENS) for _ in range(REQUESTS)]:
                answer.result(timeout=120)
        tokens = LAYERS * REQUESTS * (PROMPT_LEN + MAX_TOKENS - 1)
        scrape = serving.scrape_when(lambda scrape: scrape.value("worker_tokens_appended_total") >= tokens)
        assert scrape.value("worker_tokens_appended_total") == tokens
        assert scrape.value("steps_total") == scrape.value("worker_steps_total") >= MAX_TOKENS
        assert scrape.value("exchange_wait_seconds_count") >= LAYERS * (MAX_TOKENS - 1)
        assert scrape.value("workers_up") == scrape.value("workers") == 1
        assert scrape.value("batches_in_flight") == 0
