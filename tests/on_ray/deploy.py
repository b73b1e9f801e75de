"""Stands for an engine: brings a deployment up, prints its addresses or the error, leaves when standard input ends."""

import contextlib
import json
import sys

from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import LaminaError
from vllm_lamina.ray.driver import RayDeployment


def main(options: str) -> None:
    with contextlib.closing(RayDeployment(LaminaConfig.from_mapping(json.loads(options)), 1)) as deployment:
        try:
            answer = list(deployment.addresses)
        except LaminaError as error:
            answer = [str(error)]
        print(json.dumps(answer), flush=True)
        sys.stdin.read()
        deployment.leave()


if __name__ == "__main__":
    main(sys.argv[1])
