"""Where engines run that tests start side by side: the kernel chooses, and nobody polls on a CPU that others need."""

from __future__ import annotations

import os

BIND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment of an engine; `executor.cpus` knows that its CPUs are shared then."""

ATTENTION_CPU = str(max(os.sched_getaffinity(0)))
"""Of attention workers that a test starts itself."""
