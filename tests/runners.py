"""vLLM's model runners on a CPU: V1 as it is installed, and V2, whose Triton kernels an interpreter runs."""

from __future__ import annotations

import os
from pathlib import Path

V1, V2 = "v1", "v2"
SWITCH = "VLLM_USE_V2_MODEL_RUNNER"

DEFAULT = V2 if os.environ.get(SWITCH) == "1" else V1
"""The runner of all tests that do not name one."""


def logits_processor(name: str, runner: str = DEFAULT) -> str:
    """One of `logits_processors.py`, by the name that vLLM's option takes."""
    return f"logits_processors:{name}{runner.upper()}"


def environment(runner: str) -> dict[str, str]:
    """What a process that imports vLLM needs in its environment for this runner."""
    if runner == V1:
        return {SWITCH: "0"}
    path = [str(Path(__file__).with_name("triton_on_cpu")), os.environ.get("PYTHONPATH", "")]
    return {SWITCH: "1", "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
