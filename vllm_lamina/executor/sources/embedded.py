"""Starts and stops an attention worker as a child of this process."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import WorkerUnreachable
from vllm_lamina.units import format_cpus


class EmbeddedAttentionWorker:
    """An attention worker that lives no longer than this process, however this process ends.

    Examples
    --------
    >>> worker = EmbeddedAttentionWorker.start(memory_bytes=4 << 30, cpus=[1])
    >>> connection = AttentionWorkerConnection.connect(worker.address)
    >>> worker.stop()
    """

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self._process = process
        self.address = address

    @classmethod
    def start(
        cls, memory_bytes: int, cpus: Sequence[int] = (), log_prefix: str = "", timeout: float = 30.0
    ) -> "EmbeddedAttentionWorker":
        """Start a worker and wait until it answers.

        Parameters
        ----------
        memory_bytes
            Memory for KV blocks.
        cpus
            One thread is pinned to each; empty for one unpinned thread per CPU of this process.
        log_prefix
            Put before each line of the worker's log, which goes to this process's standard error.
        timeout
            Seconds to wait.

        Raises
        ------
        WorkerUnreachable
            The worker ended, or did not answer in time.
        """
        address = f"ipc://@vllm-lamina-control-{os.getpid()}-{secrets.token_hex(8)}"
        # -P: whatever is called like a package in the working directory is not ours.
        command = [sys.executable, "-P", "-m", "vllm_lamina.worker.attention_worker", "--listen", address]
        command += [
            "--memory",
            str(memory_bytes),
            "--parent-pid",
            str(os.getpid()),
            f"--log-prefix={log_prefix}",
        ]
        if cpus:
            command += ["--cpus", format_cpus(cpus)]
        # What is preloaded for the model worker (allocators, OpenMP) is of no use here.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        worker = cls(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL), address)
        try:
            worker._wait_until_it_answers(timeout)
        except BaseException:
            worker.stop()
            raise
        return worker

    def _wait_until_it_answers(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                AttentionWorkerConnection.connect(self.address, timeout=0.2).close()
                return
            except WorkerUnreachable:
                status = self._process.poll()
                if status is not None:
                    raise WorkerUnreachable(
                        f"the attention worker ended at its start with {_describe(status)}; see its output"
                    ) from None
                if time.monotonic() > deadline:
                    raise WorkerUnreachable(
                        f"the attention worker did not answer within {timeout:g} s"
                    ) from None

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the worker's exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End the worker at once, whatever state it is in. No effect if it ended already."""
        self._process.kill()
        self._process.wait()

    def stop(self, timeout: float = 5.0) -> None:
        """End the worker: ask it to, and after `timeout` seconds kill it. No effect if it ended already."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _describe(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
