"""The command line ``vllm-lamina``."""

import argparse
import sys

from vllm_lamina.cli import collect_env, worker


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vllm-lamina",
        description="Attention workers for vLLM: attention and KV cache on their own machines.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    worker.add_command(commands)
    collect_env.add_command(commands)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
