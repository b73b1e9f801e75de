"""Runs the planner without the rest of the command line: ``python -m vllm_lamina.planner``."""

import argparse
import sys

from vllm_lamina.planner.command import add_arguments


def main() -> int:
    """Parse the options and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vllm_lamina.planner")
    add_arguments(parser)
    arguments = parser.parse_args()
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
