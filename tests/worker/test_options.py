"""Options of an attention worker's process that depend on one another."""

import argparse
import os

import pytest

from vllm_lamina.worker.attention_worker.options import DEFAULT_LEASE_SECONDS, WorkerOptions, add_arguments

PARENT = ("--parent-pid", str(os.getpid()), "--memory", "1MiB")


def parse(*arguments: str) -> WorkerOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return WorkerOptions.parse(parser.parse_args(arguments))


def test_only_an_embedded_worker_does_without_a_lease() -> None:
    """Its engine is its parent; the parent of a worker that others reach by TCP is not."""
    assert parse("--listen", "ipc://@lamina-test", *PARENT).lease_seconds == 0
    assert parse("--listen", "127.0.0.1:7100", *PARENT).lease_seconds == DEFAULT_LEASE_SECONDS


def test_threads() -> None:
    assert parse("--memory", "1MiB", "--threads", "3").num_threads == 3
    assert parse("--memory", "1MiB", "--cpus", "0").num_threads == 1
    assert parse("--memory", "1MiB").num_threads == len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="--threads must be above 0, and --cpus says it already"):
        parse("--threads", "2", "--cpus", "0")
