"""One lane and two over vLLM's scheduler: every invariant, at every step, over thousands of random steps."""

from itertools import pairwise

import pytest
from models import ModelZoo
from simulation import (
    FULL,
    MAX_NUM_SEQS,
    SEVERAL,
    WINDOWS_AND_FULL,
    Groups,
    Simulation,
    make_config,
    make_scheduler,
)
from vllm.v1.request import RequestStatus

from vllm_lamina.compat.outputs import StepTimes
from vllm_lamina.scheduler.lanes import ALLOWED_IMBALANCE, request_load


@pytest.fixture
def make_simulation(model_zoo: ModelZoo):
    def make(
        seed: int,
        *,
        num_blocks: int = 120,
        policy: str = "fcfs",
        stagger: str = "always",
        max_loras: int | None = None,
        num_batches: int = 2,
        may_move: bool = False,
        long_prefill: int = 0,
        groups: Groups = FULL,
    ) -> Simulation:
        lora = {"enable_lora": True, "max_loras": max_loras} if max_loras is not None else {}
        options = {"scheduling_policy": policy, "lamina_stagger": stagger} | lora
        options["long_prefill_token_threshold"] = long_prefill
        config = make_config(model_zoo("llama"), num_batches, **options)
        return Simulation(make_scheduler(config, num_blocks, may_move=may_move, groups=groups), seed)

    return make


@pytest.mark.parametrize(
    ("num_batches", "stagger", "may_move"),
    [
        pytest.param(1, "auto", False, id="one batch"),
        pytest.param(2, "always", False, id="always"),
        pytest.param(2, "auto", False, id="auto"),
        pytest.param(2, "always", True, id="always, requests may move"),
        pytest.param(2, "auto", True, id="auto, requests may move"),
    ],
)
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_aborts_and_preemptions(
    make_simulation, seed: int, policy: str, num_batches: int, stagger: str, may_move: bool
) -> None:
    """A pool too small for all, so that requests are preempted; aborts and resets whatever a request is doing."""
    simulation = make_simulation(
        seed,
        num_blocks=40,
        policy=policy,
        stagger=stagger,
        num_batches=num_batches,
        may_move=may_move,
        long_prefill=50 * (seed % 2),
    )
    run_at_random(simulation, 1500)
    assert (simulation.urgency.waited_for_steps > 10) == (num_batches > 1)
    assert (simulation.urgency.preempted_in_other_lane > 10) == (num_batches > 1 and not may_move)


@pytest.mark.parametrize(
    ("num_batches", "may_move"),
    [
        pytest.param(1, False, id="one batch", marks=pytest.mark.slow),
        pytest.param(2, False, id="two"),
        pytest.param(2, True, id="two, requests may move", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("groups", "num_blocks"), list(zip(SEVERAL, (16, 60, 45, 60), strict=True)), ids=list(SEVERAL)
)
def test_several_groups(
    make_simulation, groups: str, num_blocks: int, num_batches: int, may_move: bool
) -> None:
    """Each has blocks of its own, and gives some back while the request runs."""
    run_at_random(
        make_simulation(
            5, num_blocks=num_blocks, num_batches=num_batches, may_move=may_move, groups=SEVERAL[groups]
        ),
        900,
    )


def run_at_random(simulation: Simulation, num_steps: int) -> None:
    """In a pool that is too small, with aborts and resets: all others end, and nothing is lost."""
    rng, scheduler = simulation.random, simulation.scheduler
    two = scheduler.num_batches > 1
    num_blocks = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    # Which of one batch and two is faster changes all the time.
    simulation.times = lambda requests, context: StepTimes(1.0, rng.choice([0.0001, 0.01]) * context)
    wanted: dict[str, int] = {}
    for step in range(num_steps):
        if step < num_steps * 3 / 5 and rng.random() < 0.2:
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
        if rng.random() < 0.03:
            simulation.reset(running_too=rng.random() < 0.5)
        simulation.step()
    simulation.finish()
    assert simulation.preemptions > 0
    assert (simulation.moves > 0) == scheduler.requests_may_move
    assert (simulation.overlapping_steps > 100) == two
    assert simulation.finished == {r: n for r, n in wanted.items() if r in simulation.finished}
    assert set(wanted) == set(simulation.finished) | simulation.aborted
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == num_blocks, "blocks are leaked"


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize("max_loras", [1, 3])
def test_lanes_share_the_slots_for_adapters(make_simulation, max_loras: int, num_batches: int) -> None:
    """More adapters than slots, and aborts that leave a step in flight with an adapter that nothing else uses."""
    simulation = make_simulation(max_loras, max_loras=max_loras, num_batches=num_batches)
    rng = simulation.random
    for step in range(1500):
        if step < 900 and rng.random() < 0.2:
            simulation.add(
                rng.choice([1, 20, 100]), rng.randrange(1, 40), adapter=rng.choice([None, 1, 2, 3, 4, 5])
            )
        if rng.random() < 0.1 and (unfinished := simulation.unfinished()):
            simulation.abort(rng.choice(unfinished))
        simulation.step()
    simulation.finish()
    assert (simulation.overlapping_steps > 100) == (num_batches > 1)


@pytest.mark.parametrize("may_move", [False, True])
@pytest.mark.parametrize("stagger", ["always", "auto"])
def test_sessions_come_back_to_their_lane(make_simulation, stagger: str, may_move: bool) -> None:
    """Sessions that wait for input, more of it, or none any more, beside requests that need blocks and lanes too."""
    simulation = make_simulation(3, num_blocks=60, stagger=stagger, may_move=may_move)
    rng, scheduler = simulation.random, simulation.scheduler
    simulation.times = lambda requests, context: StepTimes(1.0, rng.choice([0.0001, 0.01]) * context)
    inputs = dict.fromkeys((simulation.add(20, 5, resumable=True) for _ in range(4)), 1)
    for _ in range(700):
        if rng.random() < 0.1:
            simulation.add(rng.choice([1, 33, 300]), rng.randrange(1, 60))
        session = rng.choice(list(inputs))
        if inputs[session] < 8 and rng.random() < 0.2:
            simulation.add(rng.randrange(1, 40), rng.randrange(1, 10), session=session, resumable=True)
            inputs[session] += 1
        simulation.step()
    simulation.run_until(lambda: not simulation.unfinished())
    scheduler.finish_requests(list(inputs), RequestStatus.FINISHED_ABORTED)
    simulation.finish()
    assert simulation.preemptions > 0
    assert (simulation.moves > 0) == may_move
    assert min(inputs.values()) == 8
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 59


def test_preempted_requests_return_to_their_lanes_at_once(make_simulation) -> None:
    """Those of both lanes, though they wait in one queue by turns; and a new one runs beside them."""
    simulation = make_simulation(0, num_blocks=200)
    scheduler = simulation.scheduler
    for _ in range(10):
        simulation.add(10, max_tokens=300)
        simulation.step()
        simulation.step()
    while simulation.queue:
        simulation.answer()
    running = scheduler.running_names()
    assert len(running) == 10
    assert sum(simulation.lane_of[a] != simulation.lane_of[b] for a, b in pairwise(running)) > 5
    scheduler.preempt(running)
    simulation.add(10, max_tokens=300)
    simulation.schedule()
    assert len(scheduler.running) == 11


@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_long_prompt_is_cut_where_others_would_wait(make_simulation, num_batches: int) -> None:
    """In whichever lane these are: alone it may have all of a step."""
    simulation = make_simulation(0, num_batches=num_batches, long_prefill=50)
    for expected in ([160], [50, 50]):
        simulation.add(300, max_tokens=300)
        simulation.schedule()
        scheduled = [
            count for step in simulation.queue for count in step.output.num_scheduled_tokens.values()
        ]
        assert scheduled == expected
        while simulation.queue:
            simulation.answer()


def fill(simulation: Simulation, prompt_lens: list[int]) -> None:
    """Requests that decode for long, with all prompts computed."""
    for prompt_len in prompt_lens:
        simulation.add(prompt_len, max_tokens=300)
    for _ in range(120):
        simulation.step()
    assert len(simulation.scheduler.running) == len(prompt_lens)


@pytest.mark.parametrize("prompt_lens", [[600, 500, 30, 30, 30, 30, 30, 30], [300] * 8, [700, 10, 10, 10]])
@pytest.mark.parametrize("may_move", [False, True])
def test_lanes_are_balanced_by_context(make_simulation, prompt_lens: list[int], may_move: bool) -> None:
    """The lanes' loads differ by at most a sixteenth of the whole, or by the heavier lane's lightest request."""
    simulation = make_simulation(0, num_blocks=200, may_move=may_move)
    fill(simulation, prompt_lens)
    scheduler = simulation.scheduler
    loads = {request.request_id: request_load(request.num_tokens) for request in scheduler.running}
    totals = [scheduler.lanes.load(index, loads) for index in range(2)]
    heavier = scheduler.lanes.lanes[totals.index(max(totals))]
    lightest = min(loads[request_id] for request_id in heavier.members)
    assert abs(totals[0] - totals[1]) <= max(sum(totals) * ALLOWED_IMBALANCE, lightest)


@pytest.mark.parametrize(
    ("prompt_len", "shared_prefix", "num_blocks"),
    [
        pytest.param(5, True, 20, id="share the blocks of a prefix"),
        pytest.param(20, False, 14, id="of a block each"),
    ],
)
def test_all_run_that_the_pool_holds(
    make_simulation, prompt_len: int, shared_prefix: bool, num_blocks: int
) -> None:
    """Lanes share what runs; that keeps nobody waiting while there are blocks, as nobody waits in stock vLLM."""
    simulation = make_simulation(0, num_blocks=num_blocks)
    scheduler = simulation.scheduler
    simulation.add(prompt_len, max_tokens=12, shared_prefix=shared_prefix)
    for _ in range(4):  # until the prefix is there for the others
        simulation.step()
    for _ in range(MAX_NUM_SEQS - 1):
        simulation.add(prompt_len, max_tokens=12, shared_prefix=shared_prefix)
    for _ in range(6):
        simulation.step()
    assert len(scheduler.running) == MAX_NUM_SEQS
    assert [len(lane.members) for lane in scheduler.lanes.lanes] == [MAX_NUM_SEQS // 2] * 2
    assert simulation.preemptions == 0


@pytest.mark.parametrize("may_move", [False, True])
def test_one_batch_where_attention_is_cheap(make_simulation, may_move: bool) -> None:
    simulation = make_simulation(0, num_blocks=200, stagger="auto", may_move=may_move)
    simulation.times = lambda requests, context: StepTimes(1.0, 1e-5 * context)
    fill(simulation, [100] * 8)
    assert not any(lane.members for lane in simulation.scheduler.lanes.lanes[1:])
    assert all(len(step.output.num_scheduled_tokens) in (0, 8) for step in simulation.queue)


@pytest.mark.parametrize("may_move", [False, True])
def test_two_batches_where_attention_takes_longer_than_the_model(make_simulation, may_move: bool) -> None:
    simulation = make_simulation(0, num_blocks=200, stagger="auto", may_move=may_move)
    simulation.times = lambda requests, context: StepTimes(1.0, 3e-3 * context)
    fill(simulation, [100] * 8)
    assert sorted(len(lane.members) for lane in simulation.scheduler.lanes.lanes) == [4, 4]


def test_what_a_group_has_given_back_is_nobodys(make_simulation) -> None:
    """Behind a window of 40 tokens a group holds two blocks of 32, or three; of all 400 tokens the other holds 13."""
    simulation = make_simulation(0, num_blocks=100, groups=WINDOWS_AND_FULL)
    blocks = simulation.scheduler.kv_blocks
    name = simulation.add(400, max_tokens=60)
    simulation.run_until(lambda: simulation.scheduler.tokens_of(name) == 410)
    held = blocks.of(name)
    assert len(held) == len(set(held)) == 99 - blocks.num_free
    assert 13 + 2 * 2 <= len(held) <= 13 + 2 * 3
    _, end, spans = simulation.scheduler.computed(name)
    assert {block for _, block in spans} == set(held)
    assert [token for token, _ in spans][-13:] == list(range(0, end, 32))
    assert blocks.needed(410) == 3 * 13
    assert blocks.needed(1000) == 2 * 13 + 32, "a window of 40 tokens, and 320 of two steps in flight"
