"""Inputs of encoders under two lanes, with a cache for few of them, while steps fail: what a step reads is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from models import ModelZoo
from simulation import InFlight, Simulation, make_config, make_scheduler
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_lamina.compat.config import facts_of
from vllm_lamina.compat.outputs import failed_step
from vllm_lamina.compat.scheduled import read_step
from vllm_lamina.executor.recovery import Recovered

ROOM = 100
"""Tokens of encoders' outputs that are kept, and that one step may compute."""
LENGTHS = {"a": 60, "b": 40, "c": 30, "d": 30, "e": 90}
"""Of the inputs, by hash."""


@dataclass
class InputsSimulation(Simulation):
    """What the model worker keeps of the encoders' outputs, whichever lane computed it."""

    kept: set[str] = field(default_factory=set)
    to_forget: set[str] = field(default_factory=set)
    failing: set[int] = field(default_factory=set)
    """Steps in flight that fail, by identity."""
    full: int = 0
    """Steps in which nothing more would have fitted, though a request waited for it."""
    recoveries: int = 0
    may_rejoin: bool = False

    def add_with(self, hashes: list[str], gap: int, max_tokens: int) -> None:
        """A request with these inputs, and so many tokens before each and behind the last."""
        name = self.add(gap + sum(LENGTHS[its] + gap for its in hashes), max_tokens)
        place, request = gap, self._requests[name]
        for its in hashes:
            where = PlaceholderRange(offset=place, length=LENGTHS[its])
            request.mm_features.append(MultiModalFeatureSpec(None, "image", its, where))
            place += LENGTHS[its] + gap

    def _check(self, output: SchedulerOutput) -> InFlight:
        step = super()._check(output)
        read = read_step(output)
        self.to_forget |= set(read.inputs_to_forget)
        if not read.num_tokens:
            return step
        self.kept -= self.to_forget
        self.to_forget = set()
        for name, inputs in output.scheduled_encoder_inputs.items():
            features = self._requests[name].mm_features
            self.kept |= {features[index].identifier for index in inputs}
        assert sum(LENGTHS[its] for its in self.kept) <= ROOM, "more is kept than there is room for"
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            end = request.num_computed_tokens
            for feature in request.mm_features:
                first, last = (
                    feature.mm_position.offset,
                    feature.mm_position.offset + feature.mm_position.length,
                )
                if first < end and last > end - count:
                    assert feature.identifier in self.kept, "a step reads what no step has encoded"
                if self.scheduler.vllm_config.model_config.is_mm_prefix_lm:
                    assert not first < end < last, "a step cuts an input"
        self.full += self.scheduler.encoder_cache_manager.num_freeable_slots < min(LENGTHS.values())
        if self.random.random() < 0.05:
            self.failing.add(id(output))
        return step

    def _model_output(self, step: InFlight) -> ModelRunnerOutput:
        if id(step.output) in self.failing:
            self.failing.discard(id(step.output))
            return failed_step()
        return super()._model_output(step)

    def recover(self) -> Recovered:
        """A worker that had nothing is lost and replaced: requests go on where they stood, or are computed anew."""
        self.recoveries += 1
        return Recovered(frozenset(), frozenset(), (), 0.0)


@pytest.mark.parametrize(
    ("num_batches", "may_move", "whole"),
    [(2, False, False), (2, True, False), (2, False, True), (1, False, False)],
)
def test_inputs_are_there(
    model_zoo: ModelZoo, monkeypatch: pytest.MonkeyPatch, num_batches: int, may_move: bool, whole: bool
) -> None:
    """With inputs that are shared, in requests that are preempted and aborted; ``whole`` ones no step cuts."""
    options: dict[str, Any] = {"disable_chunked_mm_input": True} if whole else {}
    config = make_config(model_zoo("llama"), num_batches, **options)
    simulation = InputsSimulation(None, seed=1)  # type: ignore[arg-type]
    facts_of(config).recovery = simulation
    scheduler = make_scheduler(config, 45, may_move=may_move)
    scheduler.max_num_encoder_input_tokens = ROOM
    scheduler.encoder_cache_manager = EncoderCacheManager(ROOM)
    if whole:
        monkeypatch.setattr(type(config.model_config), "is_mm_prefix_lm", True)
    simulation.watch(scheduler)
    rng = simulation.random
    for step in range(900):
        if step < 700 and rng.random() < 0.2:
            hashes = rng.choices(list(LENGTHS), k=rng.randrange(4))
            simulation.add_with(hashes, rng.choice([1, 20, 70]), rng.randrange(1, 60))
        if rng.random() < 0.03 and (waiting := simulation.unfinished()):
            simulation.abort(rng.choice(waiting))
        if rng.random() < 0.02:
            simulation.reset(running_too=rng.random() < 0.5)
        simulation.step()
    simulation.finish()
    assert not simulation.errors
    assert simulation.recoveries > 10
    assert simulation.preemptions > 10
    assert simulation.full > 10
    assert not scheduler.encoder_cache_manager.request_cached_ids, "a request that is gone holds an input"
