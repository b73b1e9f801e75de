"""Markers of the runs under storms."""

from __future__ import annotations

import pytest

CHAOS, LONG = "chaos", "long_chaos"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{CHAOS}: a short run under storms; select with -m {CHAOS}")
    config.addinivalue_line("markers", f"{LONG}: a run of minutes under storms; run with -m {LONG}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if LONG not in config.getoption("markexpr"):
        skip = pytest.mark.skip(reason=f"takes minutes; run with -m {LONG}")
        for item in items:
            if item.get_closest_marker(LONG):
                item.add_marker(skip)
