"""The model on a GPU, measured: the questions first, then whole engines. Written without a GPU at hand.

    python -m benchmarks.gpu [--parts words exchange equality steps] [--output results]

Parts, each in processes of its own and under a time limit, so that a broken one costs only itself:

words      Does a stream see what the host writes, and the host what a stream writes, and after how long? In graphs too?
exchange   What a layer takes beyond its attention, with attention workers on this host's CPUs, one and two lanes, eager
           and captured.
equality   Tokens and log-probabilities of stock vLLM and of Lamina with one and two lanes, float32.
steps      Decode steps beside stock vLLM's, batches of 8, 64 and 256 at a context of 1024 tokens.

Prints a table; writes gpu.json and gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_engines, gpu_exchange, gpu_setup
from benchmarks.gpu_setup import Row

LIMITS = {"words": 40, "exchange": 90, "equality": 150, "steps": 200}
"""Seconds for each part, in this order: eight minutes in all."""

PARTS: dict[str, Callable[[Callable[[Row], None]], None]] = {
    "words": gpu_exchange.words,
    "exchange": gpu_exchange.exchange,
    "equality": gpu_engines.equality,
    "steps": gpu_engines.steps,
}


def run_parts(parts: list[str], report: Callable[[str, Row], None]) -> None:
    """Each in a process, whose lines are its rows; what it has said when its time is over stands."""
    for part in parts:
        command = [*gpu_setup.PROGRAM, "--part", part]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
            is_late = threading.Event()

            def end(child: Any = child, is_late: threading.Event = is_late) -> None:
                is_late.set()
                os.killpg(child.pid, signal.SIGKILL)

            limit = threading.Timer(LIMITS[part], end)
            limit.start()
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    report(part, json.loads(line))
            status = child.wait()
            limit.cancel()
        if is_late.is_set():
            report(part, {"error": f"not over after {LIMITS[part]:g} s"})
        elif status != 0:
            report(part, {"error": f"status {status}"})


def page(described: dict[str, str], rows: list[tuple[str, Row]]) -> str:
    """What was measured, as Markdown: a table for each part."""
    lines = [", ".join(f"{name}: {value}" for name, value in described.items()), ""]
    for part in dict.fromkeys(part for part, _ in rows):
        of_part = [row for other, row in rows if other == part]
        columns = list(dict.fromkeys(name for row in of_part for name in row))
        lines += [f"**{part}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cell(row.get(name, '')) for name in columns)} |" for row in of_part]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": os.environ.get("LAMINA_COMMIT") or commit.stdout.strip() or "unknown",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": time.strftime("%Y-%m-%d"),
        "CPUs": str(len(os.sched_getaffinity(0))),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="directory for gpu.json and gpu.md"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return PARTS[args.part](lambda row: print(json.dumps(row), flush=True))
    if args.call:
        print(json.dumps(list(gpu_engines.CALLED[args.call[0]](*args.call[1:]))), flush=True)
        os._exit(0)
    rows: list[tuple[str, Row]] = []

    def report(part: str, row: Row) -> None:
        rows.append((part, row))
        print(part, row, flush=True)

    described = describe()
    try:
        run_parts(args.parts, report)
    finally:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "gpu.json").write_text(
            json.dumps({"machine": described, "rows": rows}, indent=2) + "\n"
        )
        (args.output / "gpu.md").write_text(page(described, rows))
        print(page(described, rows))
    return None


if __name__ == "__main__":
    main()
