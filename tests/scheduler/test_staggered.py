"""Two lanes over vLLM's scheduler: every invariant, at every step, over thousands of random steps."""

import pytest
from models import ModelZoo
from simulation import Simulation, make_scheduler
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_lamina.compat.config import with_batches_in_flight

MAX_NUM_SEQS = 12


@pytest.fixture
def make_simulation(model_zoo: ModelZoo):
    def make(seed: int, *, num_blocks: int = 120, policy: str = "fcfs") -> Simulation:
        config: VllmConfig = EngineArgs(
            model=model_zoo("llama"),
            max_model_len=1024,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=160,
            scheduling_policy=policy,
            enforce_eager=True,
        ).create_engine_config()
        return Simulation(make_scheduler(with_batches_in_flight(config, 2), num_blocks), seed)

    return make


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(4))
def test_random_arrivals_aborts_and_preemptions(make_simulation, seed: int, policy: str) -> None:
    """A pool too small for all, so that requests are preempted; aborts whatever a request is doing."""
    simulation = make_simulation(seed, num_blocks=40, policy=policy)
    rng = simulation.random
    wanted: dict[str, int] = {}
    for step in range(1500):
        if step < 900 and rng.random() < 0.2:
            max_tokens = rng.randrange(1, 80)
            request_id = simulation.add(
                rng.choice([1, 20, 33, 100, 300, 600]),
                max_tokens,
                rng.randrange(3),
                shared_prefix=rng.random() < 0.4,
            )
            wanted[request_id] = max_tokens
        if rng.random() < 0.03 and (waiting := simulation.unfinished()):
            simulation.abort(rng.choice(waiting))
        simulation.step()
    steps = 0
    while simulation.unfinished():
        simulation.step()
        steps += 1
        assert steps < 20_000, f"no progress: {simulation.unfinished()}"
    assert simulation.preemptions > 0
    assert simulation.overlapping_steps > 100
    assert simulation.finished == {r: n for r, n in wanted.items() if r in simulation.finished}
    assert set(wanted) == set(simulation.finished) | simulation.aborted
    while simulation.queue or simulation.scheduler.has_finished_requests():
        simulation.step()
    # Everything was given back: the pool is as free as at the start (vLLM keeps block 0 for itself).
    assert simulation.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 39
