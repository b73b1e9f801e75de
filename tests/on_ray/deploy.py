"""Stands for an engine: brings a deployment up, prints its addresses or the error, leaves when standard input ends.

After each line of standard input it asks for its second attention worker, as an engine does that has lost it.
"""

import json
import sys

from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import LaminaError
from vllm_lamina.executor.cpus import CpuPlacement
from vllm_lamina.executor.sources.on_ray import RaySource


def main(options: str) -> None:
    source = RaySource(LaminaConfig.from_mapping(json.loads(options)), 1)
    try:
        [addresses] = source.start(CpuPlacement(None, (), shared=False))
    except LaminaError as error:
        print(json.dumps([str(error)]), flush=True)
        return
    print(json.dumps(addresses), flush=True)
    for _ in sys.stdin:
        print(json.dumps([source.restart(0, 1, addresses[1])]), flush=True)
    source.leave()
    source.close()


if __name__ == "__main__":
    main(sys.argv[1])
