"""The systems that benchmarks compare, and long-lived engines of them that take turns on the same CPUs."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL = HERE.parent / ".models" / "SmolLM2-135M-Instruct"
RANDOM_1B = HERE / "models" / "llama-1b"
"""Shape of a Llama of about 1B parameters with grouped-query attention; the weights are random."""


@dataclass(frozen=True)
class System:
    """vLLM with these options: environment variables, and keyword arguments of LLM besides the KV pool's size.

    ``worker`` are options of a `vllm-lamina worker` that the engine is given; None for stock vLLM, and where
    ``lamina_workers`` names some that run. ``latency_us`` is how much later each layer's frame reaches that worker.
    """

    name: str
    environment: dict[str, str]
    engine: dict[str, Any] = field(default_factory=dict)
    worker: tuple[str, ...] | None = None
    latency_us: int = 0


def threads(cpus: str, count: int) -> dict[str, str]:
    """The environment that gives the model worker `count` threads on `cpus`."""
    return {"VLLM_CPU_OMP_THREADS_BIND": cpus, "OMP_NUM_THREADS": str(count)}


def lamina(name: str, *, latency_us: int = 0, **engine: Any) -> System:
    """Lamina with one core for the model and one for attention."""
    return System(name, threads("0", 1), {"executor": "lamina", **engine}, ("--cpus", "1"), latency_us)


STOCK_2 = System("stock, 2 cores", threads("0-1", 2))
STOCK_1 = System("stock, 1 core", threads("0", 1))


@dataclass(frozen=True)
class Workload:
    """`batch` requests with `context` tokens each in the KV cache."""

    context: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Reads CONTEXTxBATCH, such as 2048x8."""
        context, separator, batch = text.partition("x")
        if not separator:
            raise ValueError(f"{text!r} is not CONTEXTxBATCH, such as 2048x8")
        return cls(int(context), int(batch))

    @property
    def name(self) -> str:
        return f"{self.context} x {self.batch}"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random tokens from the upper half of the vocabulary, where no special tokens are; one more than the context,
        which is what the first step computes."""
        rng = random.Random(self.name)
        return [
            [rng.randrange(vocab_size // 2, vocab_size) for _ in range(self.context + 1)]
            for _ in range(self.batch)
        ]


@dataclass(frozen=True)
class Model:
    """A Hugging Face directory; with a config.json alone, the weights are random."""

    path: Path
    dtype: str = "bfloat16"

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        return config

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of all layers for one token."""
        config = self.config
        heads = config.get("num_key_value_heads", config["num_attention_heads"])
        head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return int(
            2 * config["num_hidden_layers"] * heads * head_size * (4 if self.dtype == "float32" else 2)
        )

    def engine(self, *, max_num_seqs: int, enforce_eager: bool) -> dict[str, Any]:
        """Keyword arguments of LLM."""
        has_weights = any(self.path.glob("*.safetensors"))
        return {
            "model": str(self.path),
            "dtype": self.dtype,
            "load_format": "auto" if has_weights else "dummy",
            "max_model_len": self.config["max_position_embeddings"],
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": 0.2,
            "enforce_eager": enforce_eager,
            "skip_tokenizer_init": True,
        }


class Engine:
    """One engine in a process of its own, idle between calls of `run`. Use as a context manager."""

    def __init__(self, system: System, engine: dict[str, Any], pool_bytes: int, log_file: Path) -> None:
        self.system = system
        self.worker_address = f"127.0.0.1:{_free_port()}"
        self.pool_bytes = pool_bytes
        self._log_file = log_file
        pool: dict[str, Any] = {}
        if system.worker is not None:
            pool = {"lamina_workers": self.worker_address}
        elif "lamina_workers" not in system.engine:
            pool = {"kv_cache_memory_bytes": pool_bytes}
        self._options = engine | system.engine | pool
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Engine:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("w") as log:
            if self.system.worker is not None:
                memory = f"{-(-self.pool_bytes >> 20)}MiB"
                start = ["-m", "vllm_lamina.worker.attention_worker"]
                if self.system.latency_us:
                    start = [str(HERE / "delayed_worker.py"), str(self.system.latency_us)]
                options = ["--listen", self.worker_address, "--memory", memory, *self.system.worker]
                self._processes.append(
                    subprocess.Popen([sys.executable, *start, *options], stderr=log, text=True)
                )
                _wait_for(self.worker_address)
            self._engine = subprocess.Popen(
                [sys.executable, str(HERE / "engine_process.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=os.environ
                | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
                | self.system.environment,
            )
            self._processes.append(self._engine)
        self._ask(self._options)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._engine.stdin is not None
        self._engine.stdin.close()
        for process in reversed(self._processes):
            try:
                if process is not self._engine:
                    process.terminate()
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(
        self, prompts: list[list[int]], output_tokens: int, *, fill: bool = True, **more: Any
    ) -> dict[str, Any]:
        """Generates for all prompts at once; arguments and result are those of `engine_process.measure`.

        With ``fill`` the prompts' KV cache is filled by copies beforehand, else they are computed.
        """
        return self._ask({"prompts": prompts, "output_tokens": output_tokens, "fill": fill, **more})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._engine.stdin is not None
        assert self._engine.stdout is not None
        self._engine.stdin.write(json.dumps(message) + "\n")
        answer = self._engine.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.system.name}: the engine ended; see {self._log_file}")
        measured: dict[str, Any] = json.loads(answer)
        return measured


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(address: str, seconds: float = 20.0) -> None:
    from vllm_lamina.transport.connection import AttentionWorkerConnection
    from vllm_lamina.transport.errors import WorkerUnreachable

    end = time.monotonic() + seconds
    while True:
        try:
            AttentionWorkerConnection.connect(address, timeout=1.0).close()
            return
        except WorkerUnreachable:
            if time.monotonic() > end:
                raise
