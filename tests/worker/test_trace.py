"""A trace of a real attention worker, and the timeline made of it."""

from pathlib import Path

import pytest

from vllm_lamina.cli import main
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.timeline import ROWS, Slice, Timeline, chrome_trace, read_trace


def test_busy_fractions_and_overlap() -> None:
    slices = (
        Slice("model worker", 0, "layer 0", 0, 40, 1),
        Slice("model worker", 1, "layer 0", 40, 80, 1),
        Slice("attention worker", 0, "layer 0", 40, 90, 1),
        # Rows may overlap themselves only by mistake; what is covered counts once.
        Slice("attention worker", 1, "layer 0", 80, 100, 1),
    )
    timeline = Timeline(slices, 0, 100)
    assert timeline.busy("model worker") == pytest.approx(0.8)
    assert timeline.busy("attention worker") == pytest.approx(0.6)
    assert timeline.busy("wire") == 0
    assert timeline.overlap_efficiency == pytest.approx(1.4)


def test_an_empty_trace_is_an_error() -> None:
    with pytest.raises(ValueError, match="send requests"):
        read_trace(b"")


def test_chrome_trace_names_the_rows() -> None:
    timeline = Timeline((Slice("wire", 1, "layer 3", 1000, 4000, 8),), 1000, 4000)
    first, second, third, event = chrome_trace(timeline)["traceEvents"]
    assert [e["args"]["name"] for e in (first, second, third)] == list(ROWS)
    assert event["pid"] == ROWS.index("wire")
    assert event["tid"] == 1
    assert (event["ts"], event["dur"]) == (0.0, 3.0)


def test_without_an_engine_the_command_says_so(
    worker: EmbeddedAttentionWorker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", worker.address, "--seconds", "0.1", "--output", str(tmp_path / "t")]) == 1
    assert "no engine is connected" in capsys.readouterr().err
