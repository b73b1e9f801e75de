#!/usr/bin/env python
"""What it costs that a request never changes lanes: how even two lanes are by admission alone, and by moves.

The scheduler is the real one, its steps are simulated (`tests/scheduler/simulation.py`): there are no model and no
attention workers, and every step takes the same time. Prompts have 32 to 2000 tokens and outputs 16 to 500, both
log-uniform.

    python -m benchmarks.lane_balance       # 2 minutes, in the checkout
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from tests.scheduler.simulation import Simulation, make_config, make_scheduler
from vllm_lamina.compat.outputs import StepTimes
from vllm_lamina.scheduler.lanes import request_load

MODEL = str(Path(__file__).parent / "models" / "llama-400m-small-vocab")
NUM_STEPS = 3000


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def add(simulation: Simulation, count: int) -> None:
    rng = simulation.random
    for _ in range(count):
        simulation.add(log_uniform(rng, 32, 2000), log_uniform(rng, 16, 500))


def steady(simulation: Simulation) -> None:
    """Requests arrive one by one, at random; about 24 run."""
    add(simulation, simulation.random.random() < 1 / 12)


def burst(simulation: Simulation) -> None:
    """32 requests arrive at once, and the next 32 when these are done: the last ones run alone."""
    if not simulation.unfinished():
        add(simulation, 32)


def queue(simulation: Simulation) -> None:
    """Others wait all the time; 32 run."""
    add(simulation, 40 - len(simulation.unfinished()))


def growing(simulation: Simulation) -> None:
    """32 short prompts with long outputs, so that two batches pay only in the second half of a request's life."""
    if not simulation.unfinished():
        for _ in range(32):
            simulation.add(32, 1000)


def measure(
    workload: Callable[[Simulation], None], stagger: str, may_move: bool
) -> tuple[float, float, float]:
    """Of all steps with two requests or more: by how much of the whole load the lanes differ, as a mean and the 90th
    percentile, and in what part of the steps a lane has nothing.
    """
    config = make_config(
        MODEL,
        lamina_stagger=stagger,
        max_model_len=4096,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        skip_tokenizer_init=True,
    )
    simulation = Simulation(make_scheduler(config, 4000, may_move=may_move), seed=0)
    simulation.times = lambda requests, context: StepTimes(1 + 0.01 * requests, context / 16_000)
    lanes, differences, idle = simulation.scheduler.lanes, [], []
    for _ in range(NUM_STEPS):
        workload(simulation)
        simulation.step()
        loads = {name: request_load(n) for name, n in simulation.scheduler.running_tokens().items()}
        if len(loads) < 2:
            continue
        one, other = (sum(loads.get(name, 0) for name in lane.members) for lane in lanes.lanes)
        differences.append(abs(one - other) / (one + other))
        idle.append(not one or not other)
    return mean(differences), sorted(differences)[len(differences) * 9 // 10], mean(idle)


def main() -> None:
    print("workload   stagger  requests  difference  90th percentile  steps with an idle lane")
    for workload, stagger in ((steady, "always"), (queue, "always"), (burst, "always"), (growing, "auto")):
        for may_move in (True, False):
            difference, tail, idle = measure(workload, stagger, may_move)
            requests = "move" if may_move else "stay"
            print(
                f"{workload.__name__:10} {stagger:8} {requests:9} {difference:10.1%} {tail:15.1%} {idle:16.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
