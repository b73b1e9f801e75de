"""Keeps an engine's lease at an attention worker, and notices when the worker is gone or cut off."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from vllm_lamina.transport.sockets import Socket
from vllm_lamina.wire.messages import Heartbeat, HeartbeatReply, Refused, decode_reply, encode

BEATS_PER_TIMEOUT = 5

PATIENCE = 15
"""How many timeouts a worker on this host has for an answer as long as the system runs its process, and a serving loop
anywhere to go on: its threads may wait for a CPU, and a virtual one may itself stand still for seconds."""


class HeartbeatThread:
    """Sends heartbeats on a socket of its own, whatever the engine does meanwhile.

    Parameters
    ----------
    socket
        Connected to the worker; the thread closes it.
    lease_seconds
        How long the worker keeps the engine's pool without a heartbeat; 0 for ever.
    timeout
        Seconds without an answer after which the worker is lost. It is so too when the answers of `PATIENCE` timeouts
        say that its serving loop stands still.
    pid
        Process of a worker on this host, None elsewhere. Where it is neither gone nor stopped it may be waiting for a
        CPU, and gets `PATIENCE` timeouts.
    on_lost
        Called once, on the thread, with the reason.
    on_draining
        Called once, on the thread, when the worker waits for this engine to leave.
    """

    def __init__(
        self,
        socket: Socket,
        token: bytes,
        lease_seconds: float,
        timeout: float,
        pid: int | None,
        on_lost: Callable[[str], None],
        on_draining: Callable[[], None],
    ) -> None:
        self._socket, self._message, self._timeout = socket, encode(Heartbeat(token)), timeout
        self._pid = pid
        self._interval = min(timeout, lease_seconds or timeout) / BEATS_PER_TIMEOUT
        self._on_lost, self._on_draining = on_lost, on_draining
        self._draining = False
        self._progress: int | None = None
        self._answered = time.monotonic()
        self._stood_still = 0  # answers in a row; this process may have been stopped between two of them
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lamina-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, without a word to the worker."""
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        with self._socket:
            while True:
                with contextlib.suppress(zmq.Again):  # disconnected, and enough of them wait to be sent
                    self._socket.send_multipart([b"", self._message], zmq.NOBLOCK)
                if self._stopping.wait(self._interval):
                    return
                reason = self._take_answers()
                if reason is not None:
                    self._on_lost(reason)
                    return

    def _take_answers(self) -> str | None:
        """Take what has come; returns why the worker is lost, if it is."""
        # An answer may be on its way still: this process may have been stopped, not the worker.
        overdue = time.monotonic() - self._answered > self._timeout
        while self._socket.poll(int(self._interval * 1000) if overdue else 0):
            reply = _decode(self._socket.recv_multipart()[-1])
            if not isinstance(reply, HeartbeatReply):
                return reply.reason if isinstance(reply, Refused) else "it answers nonsense"
            goes_on = reply.progress is None or reply.progress != self._progress
            self._stood_still = 0 if goes_on else self._stood_still + 1
            self._answered, self._progress, overdue = time.monotonic(), reply.progress, False
            if reply.draining and not self._draining:
                self._draining = True
                self._on_draining()
        silent = time.monotonic() - self._answered
        if overdue and (silent > PATIENCE * self._timeout or not _runs(self._pid)):
            return f"it has not answered for {silent:.1f} s"
        if self._stood_still * self._interval > PATIENCE * self._timeout:
            return f"it answers, but its serving loop has stood still for {PATIENCE * self._timeout:g} s"
        return None


def _runs(pid: int | None) -> bool:
    """Whether there is such a process, and it is neither stopped nor dead."""
    if pid is None:
        return False
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "TtZX"


def _decode(payload: bytes) -> object:
    try:
        return decode_reply(payload)
    except msgspec.MsgspecError:
        return None
