"""Ends the engine's process when the API server is killed: vLLM's would go on, and keep all of its workers' memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait

GRACE_SECONDS = 10.0
"""Time for vLLM's own shutdown, which may wait for an answer of the one that is gone."""


def end_with_parent() -> None:
    """Let this process, if another one started it for itself, get SIGTERM when that one is gone, later SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lamina-parent-watch", daemon=True).start()
