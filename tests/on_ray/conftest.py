"""Fixtures for tests on Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray_clusters import RayCluster, cluster_on_one_host


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Three nodes. Each test leaves it empty."""
    with cluster_on_one_host(tmp_path_factory.mktemp("ray")) as cluster:
        yield cluster
