"""The slower network of benchmarks/staggering.py."""

import subprocess
import sys
import time
from pathlib import Path

from engine import Engine, Request
from worker_processes import free_port

from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "delayed_worker.py"
GEOMETRY = Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125))


def test_latency() -> None:
    """Each layer's exchange takes longer by the latency; what the worker does with it does not."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, str(PROGRAM), "30000", "--listen", address, "--memory", "64MiB", "--cpus", "0"]
    with subprocess.Popen(command) as process:
        try:
            with AttentionWorkerConnection.connect(address, timeout=20.0) as connection:
                connection.configure(GEOMETRY, 8)
                engine = Engine.on(connection, GEOMETRY, 8)
                engine.step(0, [Request(0, 40, [1, 2])])
                latency = GEOMETRY.num_layers * 0.03
                attention = []
                for context in range(40, 45):
                    begin = time.monotonic()
                    engine.step(1, [Request(context, 1, [1, 2])])
                    assert time.monotonic() - begin > latency
                    attention.append(engine.client.step_times(0)[1])
                assert min(attention) < latency / 2
        finally:
            process.kill()
