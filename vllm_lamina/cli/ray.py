"""``vllm-lamina ray status`` shows the deployments on a Ray cluster, ``vllm-lamina ray down`` removes one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from vllm_lamina.config import AUTO, ray_secret_file

if TYPE_CHECKING:
    from vllm_lamina.ray.deployment import WorkerInfo


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("ray", help="look at attention workers on a Ray cluster, or remove them")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    status = actions.add_parser("status", help="show all deployments")
    status.add_argument("--json", action="store_true", help="print them as JSON")
    status.set_defaults(run=show_status)
    down = actions.add_parser("down", help="remove a deployment")
    down.add_argument("name", metavar="NAME", help="as --lamina-ray-name says it")
    down.add_argument("--force", action="store_true", help="also if an engine uses it, which fails then")
    down.set_defaults(run=take_down)
    for action in (status, down):
        action.add_argument(
            "--address", default=AUTO, help="of the cluster, as --lamina-ray takes it (default: %(default)s)"
        )


def show_status(arguments: argparse.Namespace) -> int:
    """Print what is on the cluster."""
    from vllm_lamina.ray.cluster import connected, deployments
    from vllm_lamina.ray.deployment import DeploymentError

    try:
        with connected(arguments.address, _give_up("status")):
            found = deployments()
    except DeploymentError as error:
        return _failed("status", error)
    if arguments.json:
        print(
            json.dumps({name: [dataclasses.asdict(info) for info in infos] for name, infos in found.items()})
        )
        return 0
    if not found:
        print("no deployments")
    for name, infos in found.items():
        print(
            "\n".join(
                [f"{name}: {infos[0].shape if infos else 'its actors do not answer'}", *map(_row, infos)]
            )
        )
    return 0


def take_down(arguments: argparse.Namespace) -> int:
    """Remove a deployment."""
    from vllm_lamina.ray import cluster
    from vllm_lamina.ray.deployment import DeploymentError

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        with cluster.connected(arguments.address, _give_up("down")):
            engine = cluster.engine_of(cluster.workers_of(arguments.name))
            if engine and not arguments.force:
                raise DeploymentError(
                    f"{arguments.name!r} serves an engine ({engine}): stop that one, which removes it, or give "
                    "--force"
                )
            if not cluster.take_down(arguments.name):
                raise DeploymentError(
                    f"there is no deployment {arguments.name!r}; see `vllm-lamina ray status`"
                )
    except DeploymentError as error:
        return _failed("down", error)
    ray_secret_file(arguments.name).unlink(missing_ok=True)
    print(f"{arguments.name}: removed")
    return 0


def _row(info: WorkerInfo) -> str:
    engine = f"engine {info.engine}" if info.engine else f"no engine for {info.idle_for:.0f} s"
    state = f"pid {info.pid}, {engine}" if info.pid else f"not running: {info.error or 'starting'}"
    restarts = f", started again {info.restarts} times" if info.restarts else ""
    return f"  {info.index}  {info.address or 'no address yet'}, node {info.node[:8]}, {state}{restarts}"


def _give_up(action: str) -> Callable[[str], NoReturn]:
    def give_up(problem: str) -> NoReturn:
        print(f"vllm-lamina ray {action}: {problem}", file=sys.stderr, flush=True)
        os._exit(1)

    return give_up


def _failed(action: str, error: Exception) -> int:
    print(f"vllm-lamina ray {action}: {error}", file=sys.stderr)
    return 1
