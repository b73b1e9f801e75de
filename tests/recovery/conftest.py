"""An engine whose attention workers a test can lose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from engines import Engines
from jobs import Job
from losing import Scene


@pytest.fixture
def scene(tmp_path: Path, job: Job, engines: Engines) -> Iterator[Scene]:
    with Engines(tmp_path, beside=engines) as its_engines, ExitStack() as stack:
        yield Scene(tmp_path, job, its_engines, stack)
