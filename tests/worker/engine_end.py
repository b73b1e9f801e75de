"""An engine as a process: `python engine_end.py SECRET_FILE`, which reads lines.

The first is the address of a worker, from which it gets the attention of a step; then it writes "right", or what went
wrong, and leaves the worker with the next line. And so on.
"""

import sys

from engine import Engine, Request

from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import ConnectionFailed

GEOMETRY = Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125))
NUM_BLOCKS = 8


def main() -> None:
    while address := sys.stdin.readline().strip():
        try:
            with AttentionWorkerConnection.connect(address, secret_file=sys.argv[1]) as connection:
                connection.configure(GEOMETRY, NUM_BLOCKS, ring_bytes=1 << 20, heartbeat_timeout=60.0)
                Engine.on(connection, GEOMETRY, NUM_BLOCKS).step(0, [Request(0, 64, [3, 4])])
                print("right", flush=True)
                sys.stdin.readline()
        except ConnectionFailed as error:
            print(error, flush=True)


if __name__ == "__main__":
    main()
