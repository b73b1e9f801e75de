"""Where requests' KV blocks go, over a real scheduler with two lanes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from models import ModelZoo
from simulation import (
    FULL,
    SEVERAL,
    WINDOWS_AND_FULL,
    Groups,
    Simulation,
    full,
    make_config,
    make_scheduler,
)

from vllm_lamina.scheduler.placement import PlacedBlocks

Simulate = Callable[..., Simulation]


@pytest.fixture
def simulate(model_zoo: ModelZoo) -> Simulate:
    def make(seed: int, kind: str, blocks_per_worker: list[int], groups: Groups = FULL) -> Simulation:
        config = make_config(model_zoo("llama"))
        scheduler = make_scheduler(
            config, sum(blocks_per_worker), placement=(kind, blocks_per_worker), groups=groups
        )
        return Simulation(scheduler, seed)

    return make


def holdings(simulation: Simulation, group: int | None = None) -> dict[str, list[int]]:
    """Blocks on each worker of every running request, of all groups or one."""
    scheduler = simulation.scheduler
    placed = scheduler.placement
    assert isinstance(placed, PlacedBlocks)
    found = {}
    for request in scheduler.running:
        by_group = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        blocks = [b for ids in (by_group if group is None else [by_group[group]]) for b in ids if b]
        workers = [placed.worker_of(block) for block in blocks]
        found[request.request_id] = [workers.count(worker) for worker in range(len(placed._sizes))]
    return found


@pytest.mark.parametrize("kind", ["sequence", "request"])
@pytest.mark.parametrize("blocks_per_worker", [[20, 20], [25, 10, 5], [10, 10, 10, 10]])
def test_random_arrivals_aborts_and_preemptions(
    simulate: Simulate, kind: str, blocks_per_worker: list[int]
) -> None:
    """Pools too small for all: no block has two owners, whatever spills, and everything is given back."""
    run_at_random(simulate(1, kind, blocks_per_worker), 900)


@pytest.mark.parametrize("kind", ["sequence", "request"])
@pytest.mark.parametrize(
    "groups",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "windows and full")) for name in SEVERAL],
)
def test_blocks_of_several_groups(simulate: Simulate, kind: str, groups: str) -> None:
    run_at_random(simulate(1, kind, [10, 6] if groups == "window" else [25, 25, 10], SEVERAL[groups]), 600)


def run_at_random(simulation: Simulation, num_steps: int) -> None:
    rng = simulation.random
    num_blocks = simulation.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for step in range(num_steps):
        if step < num_steps * 2 / 3 and rng.random() < 0.2:
            prompt_len = rng.choice([1, 20, 33, 100, 300, 600])
            simulation.add(prompt_len, rng.randrange(1, 80), 0, shared_prefix=rng.random() < 0.4)
        if rng.random() < 0.03 and (waiting := simulation.unfinished()):
            simulation.abort(rng.choice(waiting))
        simulation.step()
    simulation.finish()
    assert simulation.preemptions > 0
    assert simulation.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == num_blocks


@pytest.mark.parametrize("blocks_per_worker", [[100, 100], [90, 60, 30], [40, 40, 40, 80]])
def test_sequence_divides_every_request_in_proportion(
    simulate: Simulate, blocks_per_worker: list[int]
) -> None:
    simulation = simulate(0, "sequence", blocks_per_worker)
    for prompt_len in (700, 300, 90, 64, 20, 20, 20):
        simulation.add(prompt_len, max_tokens=100)
    seen = 0
    while simulation.unfinished():
        simulation.step()
        for held in holdings(simulation).values():
            seen += 1
            for count, size in zip(held, blocks_per_worker, strict=True):
                assert abs(count - sum(held) * size / sum(blocks_per_worker)) <= 1
    assert seen > 100


def test_sequence_divides_each_group(simulate: Simulate) -> None:
    """A layer reads the blocks of its group, whatever others have where."""
    simulation = simulate(0, "sequence", [100, 100], WINDOWS_AND_FULL)
    for prompt_len in (400, 90, 20):
        simulation.add(prompt_len, max_tokens=200)
    seen = 0
    while simulation.unfinished():
        simulation.step()
        for one, other in holdings(simulation, group=WINDOWS_AND_FULL.index(full())).values():
            seen += 1
            assert abs(one - other) <= 1
    assert seen > 100


def test_short_sequences_use_all_workers(simulate: Simulate) -> None:
    simulation = simulate(0, "sequence", [50, 50, 50])
    for _ in range(9):
        simulation.add(20, max_tokens=8)
    while len(simulation.scheduler.running) < 9:
        simulation.step()
    assert [sum(counts) for counts in zip(*holdings(simulation).values(), strict=True)] == [3, 3, 3]


def test_requests_stay_on_one_worker(simulate: Simulate) -> None:
    simulation = simulate(0, "request", [120, 60, 60])
    for _ in range(8):
        simulation.add(200, max_tokens=100)
    together = {}
    while simulation.unfinished():
        simulation.step()
        found = holdings(simulation)
        for held in found.values():
            assert sum(count > 0 for count in held) <= 1
        together = max(together, found, key=len)
    assert len(together) == 8
    used = [sum(counts) for counts in zip(*together.values(), strict=True)]
    # Each worker has its part of the blocks in use, up to a request of ten blocks.
    for blocks, size in zip(used, (120, 60, 60), strict=True):
        assert abs(blocks - sum(used) * size / 240) <= 10


def test_a_request_goes_to_its_cached_prefix(simulate: Simulate) -> None:
    simulation = simulate(0, "request", [100, 100])
    simulation.add(200, max_tokens=2, shared_prefix=True)
    simulation.finish()
    for _ in range(4):
        simulation.add(200, max_tokens=40, shared_prefix=True)
    while len(simulation.scheduler.running) < 4:
        simulation.step()
    found = list(holdings(simulation).values())
    home = found[0].index(max(found[0]))
    assert all(held[home] == sum(held) > 0 for held in found)


def test_a_request_that_fits_nowhere_spills(simulate: Simulate) -> None:
    simulation = simulate(0, "request", [12, 10])
    simulation.add(500, max_tokens=10)
    while not simulation.scheduler.running or not any(map(all, holdings(simulation).values())):
        simulation.step()
    simulation.finish()
