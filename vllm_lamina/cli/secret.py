"""``vllm-lamina secret`` makes the secret file that attention workers and serving sides share."""

import argparse
import sys
from pathlib import Path


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("secret", help="make a secret file for attention workers on other machines")
    parser.add_argument("file", metavar="FILE", type=Path, help="a new file; only its owner may read it")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from vllm_lamina.transport.secret import write_secret

    try:
        write_secret(arguments.file)
    except OSError as error:
        print(f"vllm-lamina secret: cannot write {arguments.file}: {error.strerror}", file=sys.stderr)
        return 1
    print(
        f"{arguments.file}: copy it to every machine, then use it as `vllm-lamina worker --secret-file` and "
        "`vllm serve --lamina-secret-file`"
    )
    return 0
