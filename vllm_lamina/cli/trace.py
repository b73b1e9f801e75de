"""``vllm-lamina trace`` records a window of a running server and shows what either worker did in it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vllm_lamina.transport.address import DEFAULT_ADDRESS


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("trace", help="record a timeline of a running server")
    parser.add_argument(
        "address",
        metavar="ADDRESS",
        nargs="?",
        default=DEFAULT_ADDRESS,
        help="of the attention worker; one that the server started says its own in the log, ipc://@... "
        "(default: %(default)s)",
    )
    parser.add_argument("--secret-file", metavar="FILE", default="", help="of an attention worker elsewhere")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="length of the window (default: %(default)s)"
    )
    parser.add_argument(
        "--picture-ms",
        type=float,
        default=40.0,
        help="last part of it that the PNG shows (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("timeline"),
        help="writes OUTPUT.json and OUTPUT.png (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Record, write, and print the caption."""
    from vllm_lamina.timeline import chrome_trace, draw, read_trace
    from vllm_lamina.transport.connection import AttentionWorkerConnection
    from vllm_lamina.transport.errors import ConnectionFailed

    try:
        with AttentionWorkerConnection.connect(
            arguments.address, timeout=5.0, secret_file=arguments.secret_file
        ) as worker:
            timeline = read_trace(worker.trace(arguments.seconds))
    except (ConnectionFailed, ValueError) as error:
        print(f"vllm-lamina trace: {error}", file=sys.stderr)
        return 1
    trace_file = arguments.output.with_suffix(".json")
    trace_file.write_text(json.dumps(chrome_trace(timeline)))
    print(timeline.caption)
    print(f"{trace_file}: open it at ui.perfetto.dev or in chrome://tracing")
    try:
        draw(timeline, arguments.output.with_suffix(".png"), arguments.picture_ms)
    except ModuleNotFoundError:
        print("no picture: install matplotlib for it", file=sys.stderr)
    return 0
