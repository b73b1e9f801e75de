"""``vllm-lamina plan``: the one door to the planner, which an installation may be without, as without NumPy."""

from __future__ import annotations

import argparse
import sys


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], asked_for: bool) -> None:
    """Declare the command; the planner is imported, for its options, only if it is ``asked_for``."""
    if not asked_for:
        commands.add_parser("plan", help="say whether to disaggregate a model, onto what, and what it brings")
        return
    try:
        from vllm_lamina.planner.command import add_parser
    except ModuleNotFoundError as error:
        print(
            f"vllm-lamina plan: {error.name} is missing; install it with: pip install 'vllm-lamina[plan]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
    add_parser(commands)
