"""The command line ``vllm-lamina``."""

import argparse
import sys

from vllm_lamina.cli import collect_env, plan, ray, secret, trace, worker


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="vllm-lamina",
        description="Attention workers for vLLM: attention and KV cache on their own machines.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    worker.add_command(commands)
    secret.add_command(commands)
    trace.add_command(commands)
    ray.add_command(commands)
    plan.add_command(commands, asked_for=argv[:1] == ["plan"])
    collect_env.add_command(commands)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
