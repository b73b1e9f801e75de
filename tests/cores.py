"""The CPU of a test's model worker, and that of its attention workers; tests side by side have different ones."""

from __future__ import annotations

import os

_CPUS = sorted(os.sched_getaffinity(0))
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))

MODEL_CPU = str(_CPUS[_PROCESS % len(_CPUS)])
ATTENTION_CPU = str(_CPUS[(_PROCESS + 1) % len(_CPUS)])

BIND = {"VLLM_CPU_OMP_THREADS_BIND": MODEL_CPU}
"""Environment of an engine with one model worker."""
