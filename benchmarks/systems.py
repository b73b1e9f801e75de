"""The systems that benchmarks compare, and long-lived engines of them that take turns on the same CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class System:
    """vLLM with these options: environment variables, and keyword arguments of LLM besides the KV pool's size."""

    name: str
    environment: dict[str, str]
    engine: dict[str, Any] = field(default_factory=dict)

    def pool(self, size: int) -> dict[str, Any]:
        """The keyword argument that gives the engine a KV pool of `size` bytes."""
        if self.engine.get("executor") == "lamina":
            return {"lamina_memory": f"{size >> 20}MiB"}
        return {"kv_cache_memory_bytes": size}


def threads(cpus: str, count: int) -> dict[str, str]:
    """The environment that gives the model worker `count` threads on `cpus`."""
    return {"VLLM_CPU_OMP_THREADS_BIND": cpus, "OMP_NUM_THREADS": str(count)}


def two_core_systems() -> list[System]:
    """Lamina with one core for the model and one for attention, beside stock vLLM on both cores and on one."""
    return [
        System("lamina", threads("0", 1), {"executor": "lamina", "lamina_worker_cpus": "1"}),
        System("stock, 2 cores", threads("0-1", 2)),
        System("stock, 1 core", threads("0", 1)),
    ]


class Engine:
    """One engine in a process of its own, idle between calls of `run`. Use as a context manager."""

    def __init__(self, system: System, engine: dict[str, Any], pool_bytes: int, log_file: Path) -> None:
        self.system = system
        self._log_file = log_file
        self._options = engine | system.engine | system.pool(pool_bytes)

    def __enter__(self) -> Engine:
        with self._log_file.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("engine_process.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | self.system.environment,
            )
        self._ask(self._options)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def run(self, prompts: list[list[int]], output_tokens: int) -> dict[str, float]:
        """Generates for all prompts at once; returns what `engine_process.measure` measured."""
        return self._ask({"prompts": prompts, "output_tokens": output_tokens})

    def _ask(self, message: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.system.name}: the engine ended; see {self._log_file}")
        measured: dict[str, float] = json.loads(answer)
        return measured
