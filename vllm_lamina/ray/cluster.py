"""Makes, finds and removes deployments on a Ray cluster. Imports Ray, so it is for a process of its own: the CLI's."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import vllm_lamina
from vllm_lamina.ray.actor import AttentionWorkerActor
from vllm_lamina.ray.deployment import NAMESPACE, Deployment, DeploymentError, WorkerInfo, actor_name
from vllm_lamina.transport.secret import MIN_SECRET_BYTES
from vllm_lamina.worker.attention_worker.options import DEFAULT_LEASE_SECONDS

logger = logging.getLogger("vllm_lamina.ray")

CONNECT_SECONDS = 45.0
LISTEN_SECONDS = 5.0

ANSWER_SECONDS = 10.0
"""For an actor that runs."""

TOUCH_SECONDS = 2.0
"""For all actors to hear that an engine is about to come."""

START_SECONDS = 120.0
"""For actors and their attention workers to be up, once Ray has the resources."""

LEAVE_SECONDS = 5.0
"""For an engine that ends to leave its attention workers."""

LEASE_SECONDS = 1.5 * DEFAULT_LEASE_SECONDS
"""For the lease of an engine that died to run out, and its actor to know it."""

POLL_SECONDS = 0.2


@contextlib.contextmanager
def connected(address: str, give_up: Callable[[str], NoReturn]) -> Iterator[None]:
    """Be connected to a cluster.

    ``give_up`` is called by another thread with what is wrong, and ends this process, where Ray finds no end of trying.

    Raises
    ------
    DeploymentError
        The cluster cannot be reached or is of another version; also whatever Ray raises within.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    problem = _connection_problem(address, TimeoutError(f"no answer within {CONNECT_SECONDS:g} s"))
    timer = threading.Timer(CONNECT_SECONDS, give_up, (problem,))
    timer.daemon = True
    timer.start()
    try:
        _check_something_listens(address)
        # Ray lets its processes look first for what they import in the directory that this one is in.
        with contextlib.chdir("/"):
            ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (
        Exception
    ) as error:  # OSError, RuntimeError, RayError, those of gRPC: Ray has no kind of its own for it
        raise DeploymentError(_connection_problem(address, error)) from error
    finally:
        timer.cancel()
    try:
        yield
    except ray.exceptions.RayError as error:
        raise DeploymentError(f"Ray: {_first_line(error)}") from error
    finally:
        ray.shutdown()


def _check_something_listens(address: str) -> None:
    """Raises OSError at once, where Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:  # not "auto"
        socket.create_connection((host.strip("[]"), int(port)), LISTEN_SECONDS).close()


def _connection_problem(address: str, error: Exception) -> str:
    text = str(error)
    if "ersion mismatch" in text:
        versions = " ".join(text.split())
        return f"the Ray cluster at {address} is of another version: {versions}; install the cluster's on this side"
    if "ray://" in address and isinstance(error, ImportError):
        return f"{address} needs Ray's client: pip install 'ray[client]'"
    return (
        f"no Ray cluster can be reached at {address} ({_first_line(error)}); start one (`ray start --head`), correct "
        "the address, or on a machine that is not one of its nodes use ray://HOST:10001"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[0] if not lines[0].endswith(":") else f"{lines[0]} {lines[-1].strip()}").rstrip(".")


def bring_up(deployment: Deployment, is_wanted: Callable[[], bool], *, unused: bool) -> list[str]:
    """Find the deployment, or make it; replace actors that died; write its secret to the file that it names.

    One that exists with another shape is replaced, unless an engine uses it. An engine that died has the time of its
    lease to be forgotten. What was begun is undone once it is not wanted any more.

    Parameters
    ----------
    unused
        Whether it has to be free for an engine that starts.

    Returns
    -------
    list
        Addresses of the attention workers.

    Raises
    ------
    DeploymentError
    """
    name, shape = deployment.name, deployment.shape
    infos = workers_of(name)
    if infos and infos[0].shape != shape:
        if engine := _engine_that_stays(name):
            raise DeploymentError(
                f"the deployment {name!r} on Ray serves another engine ({engine}) and has {infos[0].shape}, not "
                f"{shape}: stop that engine, or choose another --lamina-ray-name"
            )
        logger.warning("the deployment %r had %s; it is replaced by %s", name, infos[0].shape, shape)
        infos = []
    group = _find_group(name)
    found = bool(infos) and group is not None and _touch(deployment)
    if found:
        logger.info("the deployment %r exists: its attention workers are used again", name)
    else:
        take_down(name)  # of another shape, about to remove itself, or without a living actor
        group = _make_group(deployment, is_wanted)
    try:
        _make_actors(deployment, group, _secret_of(name) if found else secrets.token_hex(MIN_SECRET_BYTES))
        ready = _wait_until_ready(deployment, is_wanted)
    except BaseException:
        if not found:
            take_down(name)
        raise
    # That of the actors: another engine may have been faster to make them.
    _write(Path(deployment.secret_file), _secret_of(name))
    if unused and (engine := _engine_that_stays(name)):
        raise DeploymentError(
            f"the deployment {name!r} on Ray serves another engine ({engine}): stop that one, or choose another "
            "--lamina-ray-name"
        )
    return [info.address for info in ready]


def _touch(deployment: Deployment) -> bool:
    """Begin the idle time again; False if the deployment is about to remove itself. Actors that died are gone then."""
    actors = {index: _find_actor(deployment.name, index) for index in range(deployment.shape.workers)}
    touched = {
        actor.touch.remote(deployment.idle_seconds): index
        for index, actor in actors.items()
        if actor is not None
    }
    stays = bool(touched)
    ready, _ = (
        ray.wait(list(touched), num_returns=len(touched), timeout=TOUCH_SECONDS) if touched else ([], [])
    )
    for answer in ready:
        try:
            stays &= ray.get(answer)
        except ray.exceptions.RayActorError:
            _wait_until_gone(deployment.name, touched[answer])
    return stays


def _wait_until_gone(name: str, index: int) -> None:
    _wait_until(lambda: _find_actor(name, index) is None, ANSWER_SECONDS)


def wait_until_left(name: str) -> None:
    """Give the engine that ends the time to leave its attention workers."""
    _wait_until(lambda: not engine_of(workers_of(name)), LEAVE_SECONDS)


def engine_of(infos: Sequence[WorkerInfo]) -> str:
    """The engine that is connected to these attention workers; empty if there is none."""
    return next((info.engine for info in infos if info.engine), "")


def take_down(name: str) -> bool:
    """End the deployment's attention workers and actors and remove its placement group; False if there is none."""
    group, actors = _find_group(name), _find_actors(name)
    stops = [actor.stop.remote() for actor in actors]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=ANSWER_SECONDS)
    for actor in actors:
        ray.kill(actor)
    if group is not None:
        ray.util.remove_placement_group(group)
    _wait_until(lambda: not _find_actors(name) and _find_group(name) is None, ANSWER_SECONDS)
    return bool(actors) or group is not None


def deployments() -> dict[str, list[WorkerInfo]]:
    """What is on the cluster, by name."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = sorted({a["name"].rpartition("/")[0] for a in actors if a["namespace"] == NAMESPACE})
    return {name: workers_of(name) for name in names}


def workers_of(name: str) -> list[WorkerInfo]:
    """What the actors of a deployment say, in their order; those that died are left out."""
    infos = []
    for actor in _find_actors(name):
        with contextlib.suppress(ray.exceptions.RayActorError):
            infos.append(ray.get(actor.info.remote(), timeout=ANSWER_SECONDS))
    return sorted(infos, key=lambda info: info.index)


def _make_group(deployment: Deployment, is_wanted: Callable[[], bool]) -> Any:
    name, shape = deployment.name, deployment.shape
    group = ray.util.placement_group(
        [shape.bundle] * shape.workers, strategy="SPREAD", name=name, lifetime="detached"
    )
    logger.info("waiting up to %g s for %s on Ray", deployment.wait_seconds, shape)
    ready: list[bool] = []

    def is_ready() -> bool:
        ready[:] = [group.wait(1)]
        return ready[0] or not is_wanted()

    _wait_until(is_ready, deployment.wait_seconds)
    if not ready[0]:
        ray.util.remove_placement_group(group)
        raise DeploymentError(
            f"Ray has no room for {shape.workers} x {shape.gibibytes:g} {shape.resource} with {shape.cpus} CPU each "
            f"within {deployment.wait_seconds:g} s; {_offers(shape.resource)}: lower --lamina-ray-workers, "
            "--lamina-memory or --lamina-ray-cpus, or start nodes with `ray start --resources "
            f"'{{\"{shape.resource}\": GIB}}'`"
        )
    return group


def _offers(resource: str) -> str:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    offers = [
        f"{node.get(resource, 0):g} with {node.get('CPU', 0):g} CPU" for node in nodes if resource in node
    ]
    return (
        f"its {len(nodes)} nodes offer {resource}: {', '.join(offers) or 'none'}; free are {free.get(resource, 0):g} "
        f"and {free.get('CPU', 0):g} CPU"
    )


def _make_actors(deployment: Deployment, group: Any, secret: str) -> None:
    """Make those that are missing."""
    name, shape = deployment.name, deployment.shape
    for index in range(shape.workers):
        ray.remote(AttentionWorkerActor).options(
            name=actor_name(name, index),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            # Restarts are not left to Ray: it would not let go of a restartable actor whose placement group is removed.
            max_restarts=0,
            max_concurrency=8,
            num_cpus=shape.cpus,
            resources={shape.resource: shape.gibibytes},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote(name, index, shape, secret, deployment.idle_seconds)


def _wait_until_ready(deployment: Deployment, is_wanted: Callable[[], bool]) -> list[WorkerInfo]:
    deadline = time.monotonic() + START_SECONDS
    name, count = deployment.name, deployment.shape.workers
    while True:
        actors = [_find_actor(name, index) for index in range(count)]
        try:
            infos = [
                ray.get(actor.info.remote(), timeout=max(0.1, deadline - time.monotonic()))
                for actor in actors
                if actor is not None
            ]
        except ray.exceptions.RayActorError as error:
            raise DeploymentError(f"an attention worker's actor cannot start: {_cause(error)}") from error
        except ray.exceptions.GetTimeoutError:
            infos = []
        for info in infos:
            where = f"on Ray's node {info.node[:8]}"
            if info.version != vllm_lamina.__version__:
                raise DeploymentError(
                    f"vllm-lamina {info.version} is installed {where}, {vllm_lamina.__version__} here: install the "
                    "same version on both"
                )
            if info.error:
                raise DeploymentError(f"attention worker {info.index} {where} cannot run: {info.error}")
        if len(infos) == count and all(info.address and info.pid for info in infos):
            return infos
        if time.monotonic() > deadline or not is_wanted():
            raise DeploymentError(
                f"the attention workers of {name!r} were not up within {START_SECONDS:g} s; see Ray's logs of its "
                "actors"
            )
        time.sleep(POLL_SECONDS)


def _cause(error: Exception) -> str:
    """The last line that is not empty: Ray puts the actor's own error there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    if "No module named 'vllm_lamina'" in str(error):
        return f"{text}; install vllm-lamina {vllm_lamina.__version__} on every node of the Ray cluster"
    return text


def _engine_that_stays(name: str) -> str:
    """The engine that uses the deployment, also after the time of a lease; empty if there is none."""
    _wait_until(lambda: not engine_of(workers_of(name)), LEASE_SECONDS)
    return engine_of(workers_of(name))


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _find_actor(name: str, index: int) -> Any:
    try:
        return ray.get_actor(actor_name(name, index), NAMESPACE)
    except ValueError:
        return None


def _find_actors(name: str) -> list[Any]:
    named = [
        a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE
    ]
    indexes = [int(found.rpartition("/")[2]) for found in named if found.rpartition("/")[0] == name]
    return [actor for index in sorted(indexes) if (actor := _find_actor(name, index)) is not None]


def _find_group(name: str) -> Any:
    try:
        return ray.util.get_placement_group(name)
    except ValueError:
        return None


def _secret_of(name: str) -> str:
    """The deployment's secret; any of its actors has it."""
    for actor in _find_actors(name):
        with contextlib.suppress(ray.exceptions.RayActorError):
            secret: str = ray.get(actor.secret.remote(), timeout=ANSWER_SECONDS)
            return secret
    raise DeploymentError(f"the deployment {name!r} on Ray is being removed; try again")


def _write(file: Path, secret: str) -> None:
    """Only the owner may read it; the file changes in one go, for others may read it now."""
    new = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(secret + "\n")
        new.replace(file)
    except OSError as error:
        raise DeploymentError(
            f"the deployment's secret cannot be written to {file} ({error.strerror}): set XDG_CACHE_HOME"
        ) from error
