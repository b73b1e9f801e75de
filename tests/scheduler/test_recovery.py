"""Attention workers are lost at random under vLLM's scheduler: every request still ends with the right tokens.

The simulated attention workers hold what was written to them, slot by slot. The token after a prefix is a function of
the prefix, so that the right output is known; a step that reads a slot which does not hold what it should gives a wrong
token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from models import ModelZoo
from simulation import (
    BLOCK_SIZE,
    FULL,
    SEVERAL,
    VOCAB_SIZE,
    Groups,
    InFlight,
    Part,
    Simulation,
    make_config,
    make_scheduler,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from vllm_lamina.compat.config import facts_of
from vllm_lamina.compat.outputs import failed_step
from vllm_lamina.config import HEAD, REQUEST, SEQUENCE
from vllm_lamina.executor.recovery import Recovered

WRONG = VOCAB_SIZE - 1
NUM_WORKERS = 3
BLOCKS_PER_WORKER = 30


@dataclass
class LossySimulation(Simulation):
    """Workers lose what they hold; the executor's part of a recovery is played here."""

    kind: str = HEAD
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    parts: dict[int, dict[str, list[Part]]] = field(default_factory=dict)
    """Of each step in flight, by identity: what it does for each request, in each group of layers."""
    failing: set[int] = field(default_factory=set)
    """Steps in flight that fail, by identity."""
    lost: set[int] = field(default_factory=set)
    down: set[int] = field(default_factory=set)
    stays_down: set[int] | None = None
    """Lost workers that nobody replaces; None: as it happens."""
    recoveries: int = 0
    may_rejoin: bool = False
    rejoins_soon: bool = False
    """Workers that are down are back at the next step."""

    def step(self) -> None:
        self.may_rejoin |= self.rejoins_soon and bool(self.down)
        super().step()

    def worker_of(self, block: int) -> int:
        return block // BLOCKS_PER_WORKER

    def workers_of(self, name: str) -> set[int]:
        return {self.worker_of(block) for block in self.scheduler.kv_blocks.of(name)}

    def holds(self, worker: int, block: int) -> bool:
        return self.kind == HEAD or self.worker_of(block) == worker

    def renew_shared_prefix(self) -> None:
        self._shared_prefix = [self.random.randrange(VOCAB_SIZE) for _ in range(4 * BLOCK_SIZE)]

    def lose(self, worker: int) -> None:
        """The worker's memory is gone. Steps in flight that need it fail, from the layer that they are at."""
        self.lost.add(worker)
        self.slots = {slot: value for slot, value in self.slots.items() if not self.holds(worker, slot[0])}
        for step in self.queue:
            if any(self.holds(worker, block) for block in step.used):
                self.failing.add(id(step.output))

    def recover(self) -> Recovered:
        assert not any(step.output.num_scheduled_tokens for step in self.queue), "a step is in flight"
        lost = frozenset(self.lost | self.down)
        allowed = NUM_WORKERS - 1 if self.kind != HEAD else 0
        by_chance = self.random.sample(sorted(lost), self.random.randint(0, min(allowed, len(lost))))
        self.down = set(by_chance) if self.stays_down is None else lost & self.stays_down
        self.lost.clear()
        self.may_rejoin = False
        self.recoveries += 1
        return Recovered(lost, frozenset(self.down), (), 0.0)

    def _check(self, output: SchedulerOutput) -> InFlight:
        step = super()._check(output)
        parts = {}
        for name, count in output.num_scheduled_tokens.items():
            end = self.scheduler.requests[name].num_computed_tokens
            parts[name] = self.parts_of(name, end - count, end)
        assert not self.down & {self.worker_of(block) for block in step.used}
        self.parts[id(output)] = parts
        if any(self.holds(worker, block) for worker in self.lost for block in step.used):
            self.failing.add(id(output))
        return step

    def _model_output(self, step: InFlight) -> ModelRunnerOutput:
        output = step.output
        parts = self.parts.pop(id(output))
        if id(output) in self.failing:
            self.failing.discard(id(output))
            return failed_step()
        # Of all requests first: one may read a prefix that another one of the same step writes.
        for name, by_group in parts.items():
            prefix = self._prefix_hashes(name)
            for part in by_group:
                self.slots |= {slot: prefix[token] for token, slot in part.slots_from(part.begin)}
        tokens = [self._token(name, by_group) for name, by_group in parts.items()]
        names = list(parts)
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=tokens
        )

    def _token(self, name: str, by_group: list[Part]) -> list[int]:
        request, end = self.scheduler.requests.get(name), by_group[0].end
        if request is None or end < request.num_tokens:
            return []
        prefix = self._prefix_hashes(name)
        for part in by_group:
            if any(self.slots.get(slot) != prefix[token] for token, slot in part.slots_from(part.first_seen)):
                return [WRONG]
        return [prefix[end - 1] % WRONG]

    def _prefix_hashes(self, name: str) -> list[int]:
        hashes, value = [], 0
        for token in self._requests[name].all_token_ids:
            value = hash((value, token))
            hashes.append(value)
        return hashes

    def expected(self, name: str) -> list[int]:
        request, value, tokens = self._requests[name], 0, []
        for token in request.prompt_token_ids or []:
            value = hash((value, token))
        for _ in range(request.max_tokens):
            tokens.append(value % WRONG)
            value = hash((value, tokens[-1]))
        return tokens

    def output_of(self, name: str) -> list[int]:
        return list(self._requests[name].output_token_ids)


MakeSimulation = Callable[..., LossySimulation]


@pytest.fixture
def make_simulation(model_zoo: ModelZoo) -> MakeSimulation:
    def make(
        seed: int,
        kind: str,
        recovery_timeout: float = 60,
        num_batches: int = 2,
        may_move: bool = False,
        groups: Groups = FULL,
    ) -> LossySimulation:
        config = make_config(model_zoo("llama"), num_batches, lamina_recovery_timeout=recovery_timeout)
        simulation = LossySimulation(None, seed, kind=kind)  # type: ignore[arg-type]
        facts_of(config).recovery = simulation
        placement = None if kind == HEAD else (kind, [BLOCKS_PER_WORKER] * NUM_WORKERS)
        num_blocks = NUM_WORKERS * BLOCKS_PER_WORKER
        simulation.watch(make_scheduler(config, num_blocks, placement, may_move, groups))
        return simulation

    return make


@pytest.mark.parametrize("kind", [HEAD, SEQUENCE, REQUEST])
@pytest.mark.parametrize(
    ("seed", "num_batches", "may_move"),
    [(0, 2, False), (1, 2, False), (2, 2, True), (3, 2, True), (0, 1, False), (1, 1, False)],
)
def test_workers_lost_at_random(
    make_simulation: MakeSimulation, seed: int, num_batches: int, may_move: bool, kind: str
) -> None:
    lose_workers_at_random(make_simulation(seed, kind, num_batches=num_batches, may_move=may_move))


@pytest.mark.parametrize(
    ("groups", "kind", "num_batches", "may_move"),
    [
        ("window", REQUEST, 2, True),
        ("windows and full", HEAD, 2, False),
        ("blocks of two sizes", SEQUENCE, 1, False),
        ("chunks and full", SEQUENCE, 2, False),
        *(
            pytest.param(groups, kind, 2, may_move, marks=pytest.mark.slow)
            for groups in SEVERAL
            for kind in (HEAD, SEQUENCE, REQUEST)
            for may_move in (False, True)
        ),
    ],
)
def test_workers_lost_at_random_under_several_groups(
    make_simulation: MakeSimulation, groups: str, kind: str, num_batches: int, may_move: bool
) -> None:
    lose_workers_at_random(
        make_simulation(4, kind, num_batches=num_batches, may_move=may_move, groups=SEVERAL[groups])
    )


def lose_workers_at_random(simulation: LossySimulation) -> None:
    """Every request ends with the right tokens, and no block is leaked."""
    rng = simulation.random
    for step in range(700):
        if step < 500 and rng.random() < 0.15:
            # They come together and share a prefix that nobody has computed yet: one lane fills it, the other hits it.
            simulation.renew_shared_prefix()
            for _ in range(rng.randrange(1, 4)):
                prompt_len, max_tokens = rng.choice([1, 20, 33, 100]), rng.randrange(1, 60)
                simulation.add(prompt_len, max_tokens, shared_prefix=rng.random() < 0.8)
        if rng.random() < 0.03 and (waiting := simulation.unfinished()):
            simulation.abort(rng.choice(waiting))
        if rng.random() < 0.03:
            simulation.reset(running_too=rng.random() < 0.5)
        if rng.random() < 0.05:
            simulation.lose(rng.randrange(NUM_WORKERS))
        if simulation.down and rng.random() < 0.05:
            simulation.may_rejoin = True
        simulation.step()
    simulation.rejoins_soon = True
    simulation.run_until(lambda: not simulation.unfinished())
    assert simulation.recoveries > 10
    for name in simulation.finished:
        assert simulation.output_of(name) == simulation.expected(name), name
    simulation.run_until(lambda: not simulation.queue and not simulation.scheduler.has_requests())
    assert not blocks_held(simulation), "blocks are leaked"


@pytest.mark.parametrize("kind", [HEAD, SEQUENCE, REQUEST])
@pytest.mark.parametrize("num_batches", [1, 2])
def test_sessions_that_wait_for_input(make_simulation: MakeSimulation, num_batches: int, kind: str) -> None:
    """What they have said before is recomputed with their next input."""
    simulation = make_simulation(0, kind, num_batches=num_batches)
    scheduler = simulation.scheduler
    sessions = [simulation.add(100, 5, resumable=True) for _ in range(3)]
    other = simulation.add(10, 200)
    simulation.stays_down = set()
    for _ in range(2):
        simulation.run_until(lambda: scheduler.num_waiting_for_streaming_input == 3)
        for worker in range(NUM_WORKERS):
            simulation.lose(worker)
        recoveries = simulation.recoveries
        simulation.run_until(lambda before=recoveries: simulation.recoveries > before)
        for session in sessions:
            simulation.add(20, 5, session=session, resumable=True)
    simulation.run_until(lambda: scheduler.num_waiting_for_streaming_input == 3)
    tokens = [token for session in sessions for token in scheduler.requests[session].all_token_ids]
    assert tokens.count(WRONG) == 0
    assert [scheduler.requests[session].num_tokens for session in sessions] == [153] * 3
    scheduler.finish_requests(sessions, RequestStatus.FINISHED_ABORTED)
    simulation.run_until(lambda: other in simulation.finished)
    simulation.run_until(lambda: not simulation.queue and not scheduler.has_requests())
    assert not blocks_held(simulation), "blocks are leaked"


def blocks_held(simulation: LossySimulation) -> int:
    pool = simulation.scheduler.kv_cache_manager.block_pool
    return sum(block.ref_cnt > 0 for block in pool.blocks if not block.is_null)


def test_a_prefix_that_a_failed_step_was_to_write(make_simulation: MakeSimulation) -> None:
    """The other lane's step hit it in the prefix cache. That step needs no lost worker, and does not fail."""
    simulation = make_simulation(0, REQUEST)
    decoding = {simulation.add(40, 200) for _ in range(2)}
    for _ in range(10):
        simulation.step()
    writes, reads = (simulation.add(10, 20, shared_prefix=True) for _ in range(2))
    while not simulation.queue or writes not in simulation.queue[0].output.num_scheduled_tokens:
        simulation.step()
        simulation.schedule()
    first, second = (step.output.num_scheduled_tokens for step in simulation.queue)
    [loses], [other] = decoding & first.keys(), decoding & second.keys()
    assert first.keys() == {loses, writes}
    assert second.keys() == {other, reads}
    assert second[reads] < BLOCK_SIZE, "the rest is taken from the prefix cache"
    [worker] = simulation.workers_of(loses)
    assert worker not in simulation.workers_of(writes) | simulation.workers_of(other)
    simulation.lose(worker)
    assert simulation.failing == {id(simulation.queue[0].output)}
    simulation.run_until(lambda: not simulation.unfinished())
    for name in decoding | {writes, reads}:
        assert simulation.output_of(name) == simulation.expected(name)


@pytest.mark.parametrize("kind", [SEQUENCE, REQUEST])
@pytest.mark.parametrize("runs", [True, False], ids=["when it runs", "when it comes later"])
def test_a_request_too_large_for_what_is_left_ends_with_an_error(
    make_simulation: MakeSimulation, kind: str, runs: bool
) -> None:
    """It stands in nobody's way for longer than a recovery may take."""
    simulation = make_simulation(1, kind, recovery_timeout=0.2)
    simulation.stays_down = {1, 2}
    large = simulation.add(1000, 20) if runs else None
    few = [simulation.add(40, 20) for _ in range(6)]
    for _ in range(20):
        simulation.step()
    simulation.lose(1)
    simulation.lose(2)
    large = large or simulation.add(1000, 20)
    later = [simulation.add(40, 20) for _ in range(6)]
    simulation.run_until(lambda: not simulation.unfinished())
    assert simulation.errors == {large}
    for name in few + later:
        assert simulation.output_of(name) == simulation.expected(name)
    simulation.run_until(lambda: not simulation.queue and not simulation.scheduler.has_requests())
    assert not blocks_held(simulation)


def test_a_request_too_large_for_what_is_left_is_answered_when_the_worker_returns(
    make_simulation: MakeSimulation,
) -> None:
    simulation = make_simulation(1, SEQUENCE)
    simulation.stays_down = {1, 2}
    large = simulation.add(1000, 20)
    for _ in range(10):
        simulation.step()
    simulation.lose(1)
    simulation.lose(2)
    for _ in range(100):
        simulation.step()
    assert simulation.unfinished() == [large]
    simulation.stays_down = set()
    simulation.may_rejoin = True
    simulation.run_until(lambda: not simulation.unfinished())
    assert not simulation.errors
    assert simulation.output_of(large) == simulation.expected(large)
