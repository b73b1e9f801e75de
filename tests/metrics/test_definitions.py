"""The documentation and the dashboard show the metrics that there are."""

import json
import re
from pathlib import Path
from typing import Any

from vllm_lamina.metrics.definitions import METRICS, metrics_table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "metrics.md"
DASHBOARD = ROOT / "deploy" / "grafana-lamina.json"


def exposed_names() -> set[str]:
    """Names of samples, with the suffixes of a histogram."""
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    return {metric.exposed_name + suffix for metric in METRICS for suffix in suffixes.get(metric.kind, ("",))}


def expressions() -> list[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_the_docs_show_the_table() -> None:
    begin, end = "<!-- metrics table: begin -->\n", "<!-- metrics table: end -->"
    shown = DOCS.read_text().split(begin)[1].split(end)[0]
    assert shown.strip() == metrics_table(), f"paste the output of metrics_table() into {DOCS.name}"


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    asked = {name for expression in expressions() for name in re.findall(r"vllm:lamina_\w+", expression)}
    assert asked <= exposed_names()


def test_the_dashboard_shows_every_metric() -> None:
    text = "\n".join(expressions())
    assert [metric.name for metric in METRICS if metric.exposed_name not in text] == []


def test_the_dashboard_is_complete() -> None:
    """Panels have titles and numbers of their own, lie beside one another, and ask the chosen data source."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "model_name"}


def test_names_follow_the_conventions() -> None:
    """Base units; and `_total` is added by the client library, so no name may bring it."""
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert not metric.name.endswith("_total")
        if metric.unit in ("seconds", "bytes"):
            assert metric.name.endswith(metric.unit)
