"""Random states of seeded requests on the CPU, where vLLM cannot take back a draw.

A step that computes a chunk of a prompt, but not its end, samples a token for nothing; vLLM then moves the request's
random state back, which PyTorch's generators on the CPU cannot do: the engine ends. A request with a seed may come
there by a long prompt, and by being recomputed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class _CpuGenerator(torch.Generator):
    """A generator that vLLM can move back by one draw: to the state that was kept before."""

    kept: torch.Tensor

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        del offset  # vLLM goes back by one draw, never elsewhere
        self.set_state(self.kept)


def keep_random_states(runner: Any) -> None:
    """Keep the states that the sampling that follows is going to take back; to be called before each."""
    batch = runner.input_batch
    if runner.device.type != "cpu" or not batch.generators:
        return
    for index in np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0]:
        generator = batch.generators.get(int(index))
        if generator is None:
            continue
        if not isinstance(generator, _CpuGenerator):
            generator = _as_cpu_generator(generator)
            batch.generators[int(index)] = generator
            runner.requests[batch.req_ids[index]].generator = generator
        generator.kept = generator.get_state()


def _as_cpu_generator(generator: torch.Generator) -> _CpuGenerator:
    copy = _CpuGenerator()
    copy.set_state(generator.get_state())
    return copy
