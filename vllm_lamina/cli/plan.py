"""``vllm-lamina plan``: the planner, imported only when it is asked for, since an attention worker has no NumPy."""

from __future__ import annotations

import argparse
import sys


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], asked_for: bool) -> None:
    """Declare the command; its options only if it is the one ``asked_for``."""
    if asked_for:
        try:
            from vllm_lamina.planner.command import add_parser
        except ModuleNotFoundError as error:
            print(
                f"vllm-lamina plan: needs {error.name}; install it with: pip install 'vllm-lamina[plan]'",
                file=sys.stderr,
            )
            raise SystemExit(1) from error
        add_parser(commands)
    else:
        commands.add_parser("plan", help="say whether to disaggregate a model, onto what, and what it brings")
