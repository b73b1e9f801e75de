"""Turns a trace of the exchange into a timeline: Chrome trace, picture, and how busy either side was."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = ("model worker", "wire", "attention worker")
_EVENT = struct.Struct("<8Q")
_STEP, _ATTEND = 1, 2  # frame types, as in csrc/transport/wire.h


@dataclass(frozen=True)
class Slice:
    """Something that one row did for one lane; times in nanoseconds of the steady clock."""

    row: str
    lane: int
    name: str
    begin: int
    end: int
    tokens: int


@dataclass(frozen=True)
class Timeline:
    """The slices of a trace and the window that they cover."""

    slices: tuple[Slice, ...]
    begin: int
    end: int

    def busy(self, row: str) -> float:
        """Part of the window in which a row did something."""
        spans = sorted((s.begin, s.end) for s in self.slices if s.row == row)
        covered, reached = 0, self.begin
        for begin, end in spans:
            covered += max(0, end - max(begin, reached))
            reached = max(reached, end)
        return covered / (self.end - self.begin)

    @property
    def overlap_efficiency(self) -> float:
        """Work of both workers over the window: (t_m + t_a) / wall. 1 is no overlap, 2 the limit."""
        return self.busy("model worker") + self.busy("attention worker")

    @property
    def caption(self) -> str:
        """The busy fractions in words."""
        lanes = len({s.lane for s in self.slices})
        return (
            f"{lanes} lane{'s' * (lanes > 1)}; model worker busy {self.busy('model worker'):.0%}, attention worker "
            f"{self.busy('attention worker'):.0%}; (t_m + t_a) / wall = {self.overlap_efficiency:.2f}"
        )


def read_trace(events: bytes) -> Timeline:
    """Read what ``AttentionWorkerConnection.trace`` returns.

    Sampling is not part of it: the model worker's last slice of a step ends with the logits.

    Raises
    ------
    ValueError
        The trace holds no layer.
    """
    slices: list[Slice] = []
    for kind, lane, layer, tokens, began, posted, received, done in _EVENT.iter_unpack(events):
        if kind == _ATTEND:
            name = f"layer {layer}"
            slices.append(Slice("model worker", lane, name, began, posted, tokens))
            slices.append(Slice("wire", lane, name, posted, max(posted, received), tokens))
            slices.append(Slice("attention worker", lane, name, received, done, tokens))
        elif kind == _STEP and 0 < began < posted:
            slices.append(Slice("model worker", lane, "logits", began, posted, tokens))
    if not slices:
        raise ValueError("nothing was attended in the window; send requests to the server meanwhile")
    # A slice may have begun long before the recording: the window is that of the attention worker.
    attended = [s for s in slices if s.row == "attention worker"]
    begin, end = min(s.begin for s in attended), max(s.end for s in attended)
    inside = (s for s in slices if s.begin >= begin and s.end <= end)
    return Timeline(tuple(sorted(inside, key=lambda s: s.begin)), begin, end)


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The timeline as Chrome's trace format, which Perfetto reads: one process a row, one thread a lane."""
    names: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": row}} for pid, row in enumerate(ROWS)
    ]
    slices = [
        {
            "ph": "X",
            "name": s.name,
            "cat": s.row,
            "pid": ROWS.index(s.row),
            "tid": s.lane,
            "ts": (s.begin - timeline.begin) / 1000,
            "dur": (s.end - s.begin) / 1000,
            "args": {"tokens": s.tokens},
        }
        for s in timeline.slices
    ]
    return {"traceEvents": names + slices, "otherData": {"caption": timeline.caption}}


def draw(timeline: Timeline, file: Path, milliseconds: float) -> None:
    """Draw the last part of the timeline as a PNG: a row each, a colour a lane. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    begin = max(timeline.begin, timeline.end - int(milliseconds * 1e6))
    figure, axes = pyplot.subplots(figsize=(14, 2.6))
    for lane in sorted({s.lane for s in timeline.slices}):
        for place, row in enumerate(ROWS):
            bars = _bars((s for s in timeline.slices if s.lane == lane and s.row == row), begin)
            axes.broken_barh(
                bars, (len(ROWS) - place - 1.4, 0.8), color=f"C{lane}", linewidth=0.2, edgecolor="white"
            )
        axes.plot([], [], color=f"C{lane}", linewidth=6, label=f"lane {lane}")
    axes.set_yticks([len(ROWS) - place - 1 for place in range(len(ROWS))], ROWS)
    axes.set_xlim(0, (timeline.end - begin) / 1e6)
    axes.set_xlabel("ms")
    axes.set_title(timeline.caption, fontsize=10)
    axes.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _bars(slices: Iterable[Slice], begin: int) -> Sequence[tuple[float, float]]:
    return [((s.begin - begin) / 1e6, (s.end - s.begin) / 1e6) for s in slices if s.end > begin]
