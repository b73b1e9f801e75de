"""An attention worker as a child of this process, whoever it works for: an engine, or an actor on Ray."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from vllm_lamina import run_module
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import ConnectionFailed, WorkerUnreachable


class ChildAttentionWorker:
    """An attention worker that lives no longer than this process, however this process ends.

    Parameters
    ----------
    address
        Where it listens.
    options
        Of its command line.
    secret_file, secret_fd
        Its secret: a file, and the descriptor that the child inherits where the file is one of ``/proc/self/fd``.
    keeps_last_words
        Whether its log comes by way of this process, so that a failed start can be told with its last line; else it
        goes to standard error directly.
    """

    def __init__(
        self,
        address: str,
        options: Sequence[str],
        *,
        secret_file: str = "",
        secret_fd: int | None = None,
        keeps_last_words: bool = False,
    ) -> None:
        self.address = address
        self._secret_file = secret_file
        command = run_module.command("vllm_lamina.worker.attention_worker")
        command += ["--listen", address, "--parent-pid", str(os.getpid()), *options]
        command += ["--secret-file", secret_file] if secret_file else []
        self._process = subprocess.Popen(
            command,
            # What is preloaded for the model worker (allocators, OpenMP) is of no use here.
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE if keeps_last_words else None,
            pass_fds=() if secret_fd is None else (secret_fd,),
            text=True,
        )
        self._last_lines: collections.deque[str] = collections.deque(maxlen=1)
        self._reader: threading.Thread | None = None
        if keeps_last_words:
            self._reader = threading.Thread(target=self._pass_on, name="lamina-log", daemon=True)
            self._reader.start()

    def wait_until_it_answers(self, timeout: float, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Wait for that many seconds, or until the worker is not wanted any more.

        Raises
        ------
        WorkerUnreachable
            The worker ended, or did not answer in time.
        """
        deadline = time.monotonic() + timeout
        while is_wanted():
            try:
                AttentionWorkerConnection.connect(
                    self.address, timeout=0.2, secret_file=self._secret_file
                ).close()
                return
            except (
                ConnectionFailed
            ):  # whatever it is: another program may have the address, and then ours ends
                status = self.poll()
                if status is not None:
                    raise WorkerUnreachable(
                        f"the attention worker ended at its start with {_describe(status)}{self._last_words()}"
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
        if self.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def _pass_on(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_lines.append(line.rstrip())
            sys.stderr.write(line)

    def _last_words(self) -> str:
        if self._reader is None:
            return "; see its output"
        self._reader.join(1.0)
        return f": {self._last_lines[-1]}" if self._last_lines else ", without a word"


def _describe(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
