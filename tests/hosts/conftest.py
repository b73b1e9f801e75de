"""Fixtures for tests across hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Host, hosts

from vllm_lamina.transport.secret import write_secret


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
