"""Fixtures for tests across hosts, and the marker of those that take minutes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Host, hosts

from vllm_lamina.transport.secret import write_secret

EVERY_PARTITION = "every_partition"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{EVERY_PARTITION}: a server with the real model for each partition; run with -m {EVERY_PARTITION}",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if EVERY_PARTITION not in config.getoption("markexpr"):
        skip = pytest.mark.skip(reason=f"takes minutes; run with -m {EVERY_PARTITION}")
        for item in items:
            if item.get_closest_marker(EVERY_PARTITION):
                item.add_marker(skip)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """As `vllm-lamina secret` makes it."""
    write_secret(tmp_path / "lamina.secret")
    return tmp_path / "lamina.secret"


@pytest.fixture
def four_hosts() -> Iterator[list[Host]]:
    """The first is the serving machine."""
    with hosts(4) as made:
        yield made
