"""Says what is on a Ray cluster, as `vllm-lamina ray status --json` does, for each line of standard input."""

import json
import sys
from dataclasses import asdict
from typing import NoReturn

from vllm_lamina.ray.cluster import connected, deployments


def main(address: str) -> None:
    def give_up(problem: str) -> NoReturn:
        sys.exit(problem)

    with connected(address, give_up):
        for _ in sys.stdin:
            print(
                json.dumps({name: [asdict(i) for i in infos] for name, infos in deployments().items()}),
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1])
