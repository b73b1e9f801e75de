"""Says what is on a Ray cluster, as `vllm-lamina ray status --json`, and what is free, for each line that it reads."""

import json
import sys
from dataclasses import asdict
from typing import NoReturn

import ray

from vllm_lamina.ray.cluster import connected, deployments


def main(address: str) -> None:
    def give_up(problem: str) -> NoReturn:
        sys.exit(problem)

    with connected(address, give_up):
        for _ in sys.stdin:
            found = {name: [asdict(i) for i in infos] for name, infos in deployments().items()}
            print(json.dumps([found, ray.available_resources()]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
