"""Storms for as long as wanted: `python -m tests.chaos --minutes 10 --seed 1 --layout request+spare@hosts`."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from chaos_questions import make_questions
from chaos_run import run
from engines import Engines
from layouts import EVERY, Layout
from model_specs import OTHERS
from models import create_model
from storms import Kind, Storm


def main() -> int:
    """The exit status. SIGTERM ends it as Ctrl-C does: with everything that it started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _run(_parse())
    except pytest.skip.Exception as reason:  # of the tests' network: it says what this system does not permit
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    storms = None
    layouts = arguments.layout or [Layout.parse("embedded")]
    seed = arguments.seed
    if arguments.replay is not None:
        replay = json.loads(arguments.replay.read_text())
        storms = [Storm.from_dict(storm) for storm in replay["storms"]]
        layouts, seed = arguments.layout or [Layout.parse(replay["layout"])], replay["seed"]
    root = arguments.directory or Path(tempfile.mkdtemp(prefix="lamina-chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    model = str(create_model(OTHERS["four_kv_heads"], root / "model"))
    (root / "stock").mkdir()
    with Engines(root / "stock") as engines:
        questions = make_questions(engines, model)
    failed = []
    for layout in layouts:
        directory = root / str(layout)
        directory.mkdir()
        print(f"{layout}, seed {seed}; logs in {directory}", flush=True)
        outcome = run(
            layout,
            seed,
            60 * arguments.minutes,
            model,
            questions,
            directory,
            storms,
            frozenset(arguments.only or Kind),
            lambda line: print(line, flush=True),
        )
        print(outcome.summary(), "\n", flush=True)
        failed += [str(layout)] if outcome.failures else []
    if failed:
        print(f"FAILED: {', '.join(failed)}, seed {seed}; see {root}")
    elif arguments.directory is None:
        shutil.rmtree(root)
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="of storms, for each layout (default: 2)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16), help="(default: a random one)")
    parser.add_argument(
        "--layout",
        type=_layouts,
        action="extend",
        help=f"more than once for several, or 'all' (default: embedded): {', '.join(map(str, EVERY))}",
    )
    parser.add_argument(
        "--only", type=Kind, action="append", help=f"kind of disturbance: {', '.join(Kind)} (default: all)"
    )
    parser.add_argument("--replay", type=Path, metavar="EVENTS_JSON", help="the storms of an earlier run")
    parser.add_argument(
        "--directory", type=Path, help="for logs (default: a temporary one, kept after a failure)"
    )
    return parser.parse_args()


def _layouts(text: str) -> list[Layout]:
    try:
        return list(EVERY) if text == "all" else [Layout.parse(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
