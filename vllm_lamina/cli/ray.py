"""``vllm-lamina ray``: ``up`` makes or finds a deployment on a Ray cluster, ``down`` ends it, ``status`` shows all."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import IO, NoReturn

from vllm_lamina.config import AUTO, LaminaConfig, ray_secret_file
from vllm_lamina.errors import ConfigError
from vllm_lamina.ray.deployment import Deployment, DeploymentError, WorkerInfo, up_flags


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("ray", help="make, look at or remove attention workers on a Ray cluster")
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    up = actions.add_parser(
        "up", help="make a deployment, or find it, and print the options by which engines use it"
    )
    up.add_argument("--json", action="store_true", help="print them, or the error, as JSON")
    for flag, field in up_flags().items():
        text = "Memory of each attention worker." if field.name == "memory" else field.metadata["help"]
        value = flag.removeprefix("--").upper().replace("-", "_")
        up.add_argument(
            flag, dest=field.name, metavar=value, type=type(field.default), default=field.default, help=text
        )
    up.add_argument(
        "--unused",
        action="store_true",
        help="fail where an engine uses it, once one that died has had the time to be forgotten",
    )
    up.add_argument(
        "--parent-pid",
        type=int,
        default=0,
        help="undo what has begun if that process, which is the parent, ends",
    )
    status = actions.add_parser("status", help="show all deployments")
    status.add_argument("--json", action="store_true", help="print them as JSON")
    down = actions.add_parser("down", help="remove a deployment")
    down.add_argument(
        "--force", action="store_true", help="also if an engine uses it, which loses its attention workers"
    )
    down.add_argument(
        "--leaving",
        action="store_true",
        help="in the background, and give the engine some seconds to leave first",
    )
    for action in (up, down):
        action.add_argument("name", metavar="NAME", help="as --lamina-ray-name says it")
    for action, run in ((up, bring_up), (status, show_status), (down, take_down)):
        action.set_defaults(run=run)
        action.add_argument(
            "--address", default=AUTO, help="of the cluster, as --lamina-ray takes it (default: %(default)s)"
        )


def bring_up(arguments: argparse.Namespace) -> int:
    """Make a deployment, or find it."""
    options = {field.name: getattr(arguments, field.name) for field in up_flags().values()}
    try:
        deployment = Deployment.asked_for(
            LaminaConfig(ray=arguments.address, ray_name=arguments.name, **options)
        )
    except ConfigError as error:
        return _failed(arguments, error, sys.stdout)

    told_to_end: list[int] = []

    def is_wanted() -> bool:
        return not told_to_end and arguments.parent_pid in (0, os.getppid())

    def act(cluster: ModuleType) -> str:
        if arguments.parent_pid:
            signal.signal(
                signal.SIGTERM, lambda number, frame: told_to_end.append(number)
            )  # instead of Ray's
        addresses = cluster.bring_up(deployment, is_wanted, unused=arguments.unused)
        if arguments.json:
            return json.dumps({"addresses": addresses, "secret_file": deployment.secret_file})
        return f"--lamina-workers {','.join(addresses)} --lamina-secret-file {deployment.secret_file}"

    if arguments.parent_pid:  # it decides, also where a terminal signals all processes
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s Lamina, Ray: %(message)s", level=logging.WARNING)
    logging.getLogger("vllm_lamina.ray").setLevel(logging.INFO)
    return _on_cluster(arguments, act)


def show_status(arguments: argparse.Namespace) -> int:
    """Print what is on the cluster."""

    def act(cluster: ModuleType) -> str:
        found = cluster.deployments()
        if arguments.json:
            return json.dumps(
                {name: [dataclasses.asdict(info) for info in infos] for name, infos in found.items()}
            )
        lines = []
        for name, infos in found.items():
            lines.append(f"{name}: {infos[0].shape if infos else 'its actors do not answer'}")
            lines += map(_row, infos)
        return "\n".join(lines) or "no deployments"

    return _on_cluster(arguments, act)


def take_down(arguments: argparse.Namespace) -> int:
    """Remove a deployment."""
    if arguments.leaving:
        if os.fork():
            return 0  # vLLM kills all descendants of an engine that takes too long to end
        os.setsid()
        _ignore_signals()

    def act(cluster: ModuleType) -> str:
        if arguments.leaving:
            _ignore_signals()  # Ray has put its own handlers there
            cluster.wait_until_left(arguments.name)
        engine = cluster.engine_of(cluster.workers_of(arguments.name))
        if engine and not arguments.force:
            raise DeploymentError(
                f"{arguments.name!r} serves an engine ({engine}): stop that one, which removes it, or give --force"
            )
        if not cluster.take_down(arguments.name):
            raise DeploymentError(f"there is no deployment {arguments.name!r}; see `vllm-lamina ray status`")
        ray_secret_file(arguments.name).unlink(missing_ok=True)
        return f"{arguments.name}: removed"

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    return _on_cluster(arguments, act)


def _on_cluster(arguments: argparse.Namespace, act: Callable[[ModuleType], str]) -> int:
    """Print what an action says that uses the module `cluster`, which needs Ray; returns the exit status."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints, too

    def give_up(problem: str) -> NoReturn:
        os._exit(_failed(arguments, DeploymentError(problem), answers))

    try:
        from vllm_lamina.ray import cluster

        with cluster.connected(arguments.address, give_up):
            answer = act(cluster)
        print(answer, file=answers, flush=True)
        return 0
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        return _failed(arguments, ConfigError("it needs Ray: pip install 'vllm-lamina[ray]'"), answers)
    except DeploymentError as error:
        return _failed(arguments, error, answers)
    finally:
        os.dup2(answers.fileno(), 1)
        answers.close()


def _failed(arguments: argparse.Namespace, error: Exception, answers: IO[str]) -> int:
    if getattr(arguments, "json", False):
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
    else:
        print(f"vllm-lamina ray {arguments.action}: {error}", file=sys.stderr, flush=True)
    return 1


def _ignore_signals() -> None:
    """What ends an engine, from a terminal or a supervisor, may not end what cleans up after it."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)


def _row(info: WorkerInfo) -> str:
    engine = f"engine {info.engine}" if info.engine else f"no engine for {info.idle_for:.0f} s"
    state = f"pid {info.pid}, {engine}" if info.pid else f"not running: {info.error or 'starting'}"
    restarts = f", started again {info.restarts} times" if info.restarts else ""
    return f"  {info.index}  {info.address or 'no address yet'}, node {info.node[:8]}, {state}{restarts}"
