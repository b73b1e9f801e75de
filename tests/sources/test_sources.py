"""Where attention workers come from, with real ones: what is known before they start, who starts and ends them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from worker_processes import free_port, worker_process

from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.cpus import CpuPlacement
from vllm_lamina.executor.executors import check_states_fit
from vllm_lamina.executor.sources.embedded import EmbeddedSource
from vllm_lamina.executor.sources.named import NamedSource
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import ConnectionFailed, WorkerRefused

MIB = 1 << 20
GEOMETRY = Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125))
LAST_CPU = (max(os.sched_getaffinity(0)),)
TWO_RANKS = CpuPlacement(None, (LAST_CPU, LAST_CPU), shared=True)


def pool_at(address: str) -> int:
    """Bytes; 0 if nobody answers."""
    try:
        with AttentionWorkerConnection.connect(address, 1.0, waits_for_listener=False) as worker:
            return worker.pool_bytes
    except ConnectionFailed:
        return 0


def test_embedded_workers_live_with_the_source() -> None:
    source = EmbeddedSource(LaminaConfig(memory="64MiB"), 2)
    first, second = source.check(GEOMETRY, 1024)
    assert first == second
    assert first.num_blocks == 32 * MIB // GEOMETRY.block_bytes()
    try:
        [[one], [other]] = source.start(TWO_RANKS)
        assert pool_at(one) == pool_at(other) == 32 * MIB
        another = source.restart(1, 0, other)
        assert pool_at(another) == 32 * MIB
        assert pool_at(other) == 0
        source.leave()
        assert pool_at(one) == 32 * MIB, "the model workers still need it"
    finally:
        source.close()
    assert pool_at(one) == pool_at(another) == 0
    source.close()


def test_the_pool_of_embedded_workers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As asked of Lamina, or of vLLM, or a part of what is free once the model is loaded."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with pytest.raises(ConfigError, match="1000 TiB is more than this host has"):
        EmbeddedSource(LaminaConfig(memory="1000TiB"), 1).check(GEOMETRY, 1024)
    with pytest.raises(
        ConfigError, match=r"256 MiB and the 1000 TiB of the states .* choose less memory, or fewer"
    ):
        EmbeddedSource(LaminaConfig(memory="256MiB"), 2).start(TWO_RANKS, state_bytes=1000 << 40)
    with pytest.raises(
        ConfigError, match="states of --max-num-seqs 7 requests take 1000 TiB beside the model"
    ):
        check_states_fit(1000 << 40, 7)
    source = EmbeddedSource(LaminaConfig(), 1, kv_cache_memory_bytes=48 * MIB)
    assert source.check(GEOMETRY, 1024) == []
    try:
        [[address]] = source.start(CpuPlacement(None, (LAST_CPU,), shared=False, shared_cores=((0, 1),)))
        assert pool_at(address) == 48 * MIB
        assert "hyperthreads of the same cores (CPUs 0-1) serve different workers" in caplog.text
    finally:
        source.close()


def test_named_workers_outlive_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with (
        worker_process(tmp_path / "one.log", one),
        worker_process(tmp_path / "other.log", other, "--memory", "32MiB"),
    ):
        with pytest.raises(ConfigError, match="choose a multiple of it for --lamina-workers, not 2"):
            NamedSource(LaminaConfig(workers=f"{one},{other}"), 3).check(GEOMETRY, 1024)
        source = NamedSource(LaminaConfig(workers=f"{one},{other}"), 2)
        with monkeypatch.context() as here:
            # Their CPUs may be others: a KV block's size is theirs to say.
            here.delattr(Geometry, "block_bytes")
            first, second = source.check(GEOMETRY, 1024)
        assert first.num_blocks == 64 * MIB // GEOMETRY.block_bytes()
        assert second.num_blocks == 32 * MIB // GEOMETRY.block_bytes()
        assert source.start(TWO_RANKS) == [(one,), (other,)]
        assert source.restart(1, 0, other) == other
        with AttentionWorkerConnection.connect(other) as engine:
            engine.configure(GEOMETRY, 8)
            with pytest.raises(WorkerRefused, match=f"{other} serves another engine"):
                source.check(GEOMETRY, 1024)
        source.leave()
        source.close()
        assert pool_at(one)
        assert pool_at(other)
