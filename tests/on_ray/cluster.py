"""Runs a Ray cluster on this machine: `cluster.py NODES GIBIBYTES`. Prints its address; ends with standard input."""

import sys
from typing import Any

from ray.cluster_utils import Cluster


def main(nodes: int, gibibytes: int) -> None:
    node: dict[str, Any] = {
        "num_cpus": 1,
        "resources": {"lamina_memory": gibibytes},
        "object_store_memory": 80 << 20,
        "include_dashboard": False,
    }
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**node)
        print(cluster.address, flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
