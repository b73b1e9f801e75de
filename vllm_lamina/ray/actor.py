"""The actor that runs an attention worker on its node, and removes the deployment when no engine uses it.

Imports Ray: for `cluster` and for Ray's own processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time

import ray

import vllm_lamina
from vllm_lamina.ray.deployment import NAMESPACE, Shape, WorkerInfo, actor_name
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import ConnectionFailed
from vllm_lamina.worker.attention_worker.child import ChildAttentionWorker

logger = logging.getLogger("vllm_lamina.ray")

LOOK_SECONDS = 0.2
"""How often the worker's process is looked at."""

ASK_SECONDS = 1.0
"""How often the worker is asked whether an engine is connected; more often where the idle time is short."""

START_SECONDS = 60.0
MAX_BACKOFF_SECONDS = 30.0
STOP_SECONDS = 5.0
NUM_PORTS = 100


class AttentionWorkerActor:
    """One attention worker: a process that ends with this one, is started again when it dies, at the same address.

    Ray makes the actor, detached and named. A thread of its own does all that takes time; the methods answer at once,
    but for `stop`.

    Parameters
    ----------
    name
        Of the deployment.
    index
        Of this worker in it.
    secret
        Of the deployment. It is handed to the worker in memory, and written to no file.
    idle_seconds
        See `LaminaConfig.ray_idle_seconds`.
    """

    def __init__(self, name: str, index: int, shape: Shape, secret: str, idle_seconds: float) -> None:
        self._name, self._index, self._shape, self._secret = name, index, shape, secret
        self._idle_seconds = idle_seconds
        self._node = ray.get_runtime_context().get_node_id()
        self._group = ray.util.get_current_placement_group()
        self._host = ray.util.get_node_ip_address()
        self._secret_fd = os.memfd_create("lamina-secret")
        os.fchmod(self._secret_fd, 0o600)
        os.write(self._secret_fd, secret.encode())
        self._port = 0
        self._address = self._engine = self._error = ""
        self._worker: ChildAttentionWorker | None = None
        self._starts = self._failures = 0
        self._used_at = time.monotonic()
        self._stopping = threading.Event()
        logging.basicConfig(
            format=f"%(levelname)s %(asctime)s {name}-{index}: %(message)s",
            datefmt="%m-%d %H:%M:%S",
            level=logging.INFO,
        )
        self._thread = threading.Thread(target=self._run, name="lamina-watch", daemon=True)
        self._thread.start()

    def info(self) -> WorkerInfo:
        """What there is to know, without asking the worker."""
        return WorkerInfo(
            index=self._index,
            shape=self._shape,
            node=self._node,
            version=vllm_lamina.__version__,
            address=self._address,
            pid=self._worker.pid if self._is_running() and self._worker else 0,
            engine=self._engine,
            idle_for=time.monotonic() - self._used_at,
            restarts=max(0, self._starts - 1),
            error=self._error,
        )

    def touch(self, idle_seconds: float) -> bool:
        """Say that an engine is about to connect; False if the deployment is being removed already."""
        self._idle_seconds = idle_seconds
        self._used_at = time.monotonic()
        return not self._stopping.is_set()

    def secret(self) -> str:
        """The deployment's secret."""
        return self._secret

    def stop(self) -> None:
        """End the worker, for good."""
        self._stopping.set()
        self._thread.join(2 * STOP_SECONDS)
        self._end_worker()

    def _run(self) -> None:
        asked_at = 0.0
        while not self._stopping.wait(LOOK_SECONDS):
            if not self._is_running():
                self._start_again()
            elif time.monotonic() - asked_at >= min(ASK_SECONDS, self._idle_seconds / 4):
                asked_at = time.monotonic()
                self._ask()
            if time.monotonic() - self._used_at > self._idle_seconds:
                self._used_at = max(self._used_at, self._others_used_at())
            if time.monotonic() - self._used_at > self._idle_seconds:
                self._remove_deployment()

    def _is_running(self) -> bool:
        return self._worker is not None and self._worker.poll() is None

    def _start_again(self) -> None:
        if self._worker is not None:
            logger.error("the attention worker ended with status %s; starting it again", self._worker.poll())
            self._worker = None
        self._engine = ""
        try:
            self._start()
        except (OSError, ConnectionFailed) as error:
            self._error = str(error)
            self._end_worker()
            pause = min(MAX_BACKOFF_SECONDS, 2.0**self._failures)
            self._failures += 1
            logger.error("%s; trying again in %g s", self._error, pause)
            self._stopping.wait(pause)

    def _start(self) -> None:
        """Start the worker, and wait until it answers. Raises OSError or ConnectionFailed, with its last words."""
        port = self._port or self._free_port()
        host = f"[{self._host}]" if ":" in self._host else self._host
        # Who asks it to end has seen to its engine.
        options = ["--memory", str(self._shape.memory_bytes), "--threads", str(self._shape.cpus)]
        options += ["--drain-seconds", "0", f"--log-prefix={self._name}-{self._index}: "]
        self._worker = ChildAttentionWorker(
            f"{host}:{port}",
            options,
            secret_file=self._secret_file,
            secret_fd=self._secret_fd,
            keeps_last_words=True,  # its log becomes the actor's, which is where Ray shows it
        )
        self._starts += 1
        self._worker.wait_until_it_answers(START_SECONDS, lambda: not self._stopping.is_set())
        # From here on engines know the address: it stays, whatever becomes of this process of the worker.
        self._port, self._address, self._error, self._failures = port, self._worker.address, "", 0
        logger.info("attention worker at %s, pid %d", self._address, self._worker.pid)

    @property
    def _secret_file(self) -> str:
        return f"/proc/self/fd/{self._secret_fd}"

    def _free_port(self) -> int:
        """The first free port of those that are this worker's: no two of a deployment try the same.

        So an actor that replaces one that died finds the port of its predecessor.
        """
        ports = [self._shape.port + self._index + i * self._shape.workers for i in range(NUM_PORTS)]
        for port in ports:
            with contextlib.suppress(OSError, OverflowError), socket.create_server((self._host, port)):
                return port
        raise OSError(
            f"no TCP port of {ports[0]}, {ports[1]}, ..., {ports[-1]} is free on {self._host}; choose others with "
            "--lamina-ray-port"
        )

    def _ask(self) -> None:
        try:
            with AttentionWorkerConnection.connect(
                self._address, timeout=2.0, secret_file=self._secret_file
            ) as worker:
                self._engine = worker.welcome.engine
        except ConnectionFailed as error:
            logger.warning("%s", error)
            return
        if self._engine:
            self._used_at = time.monotonic()

    def _others_used_at(self) -> float:
        """When an engine last used another worker of the deployment: it may do without this one, or wait for it."""
        used_at = 0.0
        for index in range(self._shape.workers):
            with contextlib.suppress(ValueError, ray.exceptions.RayError):  # it died
                if index != self._index:
                    other = ray.get_actor(actor_name(self._name, index), NAMESPACE)
                    info: WorkerInfo = ray.get(other.info.remote(), timeout=ASK_SECONDS)
                    used_at = max(used_at, time.monotonic() - info.idle_for)
        return used_at

    def _remove_deployment(self) -> None:
        """Give everything back: Ray ends all actors of the placement group, this one too."""
        logger.info("no engine for %g s: the deployment %s is removed", self._idle_seconds, self._name)
        self._stopping.set()
        self._end_worker()
        while True:
            try:
                ray.util.remove_placement_group(self._group)
            except ray.exceptions.RayError as error:
                logger.error("the placement group cannot be removed yet: %s", error)
            time.sleep(ASK_SECONDS)

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop(STOP_SECONDS)
