"""A step as the attention workers are told of it, from what the scheduler says, against a reference of plain loops."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_lamina.attention_backend.backend import LaminaAttentionBackend
from vllm_lamina.attention_backend.exchange import Exchange
from vllm_lamina.attention_backend.host_layers import HostLayers
from vllm_lamina.attention_backend.impl import LaminaAttentionImpl
from vllm_lamina.attention_backend.metadata import LaminaMetadata, LaminaMetadataBuilder
from vllm_lamina.attention_backend.spans import with_spans
from vllm_lamina.attention_backend.step import ContextRows, PlannedRequest, Step, StepPlan
from vllm_lamina.compat.scheduled import ScheduledRequest, ScheduledStep
from vllm_lamina.device import device_for
from vllm_lamina.device.base import Chunks, LayerShape
from vllm_lamina.errors import LaminaError
from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, LayerSpec
from vllm_lamina.worker.model_worker.step_planner import StepPlanner

BLOCK_SIZE = 32
GEOMETRY = Geometry.uniform(1, BLOCK_SIZE, 2, 1, 32, "float32", (0.1,))

# vLLM's metadata of a step, of which nothing is read.
WHATEVER = CommonAttentionMetadata(*[torch.empty(0)] * 3, *[0] * 4, *[torch.empty(0)] * 2)


class Client:
    """Takes down what a step sends."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []

    def begin_step(self, *step: Any) -> None:
        self.steps.append(step)


def sent(step: Step) -> tuple[Any, ...]:
    client = Client()
    step.send_once(client, 3, 60.0)  # type: ignore[arg-type]
    step.send_once(client, 3, 60.0)  # type: ignore[arg-type]
    [once] = client.steps
    return once


def request(context_len: int, query_len: int, block_ids: list[int]) -> PlannedRequest:
    return PlannedRequest(context_len, query_len, (np.array(block_ids, np.int32),))


def plan(*requests: PlannedRequest, order: list[int] | None = None) -> StepPlan:
    by_name = {f"r{i}": r for i, r in enumerate(requests)}
    return StepPlan(by_name, lambda: [f"r{i}" for i in order or range(len(requests))])


@pytest.mark.parametrize("seed", range(20))
def test_a_step_is_what_the_scheduler_says(seed: int) -> None:
    chance = random.Random(seed)
    requests = []
    for _ in range(chance.randrange(1, 9)):
        context, query = chance.choice([0, 1, 31, 32, 100]), chance.choice([1, 1, 1, 2, 33, 64])
        needed = -(-(context + query) // BLOCK_SIZE)
        requests.append(request(context, query, chance.sample(range(500), needed + chance.randrange(3))))
    order = sorted(range(len(requests)), key=lambda i: requests[i].query_len)
    step = Step(plan(*requests, order=order), GEOMETRY)
    lane, num_decodes, query_lens, context_lens, [(table, slots)], timeout = sent(step)
    assert (lane, timeout) == (3, 60.0)
    in_order = [requests[i] for i in order]
    assert query_lens.tolist() == [r.query_len for r in in_order]
    assert context_lens.tolist() == [r.context_len for r in in_order]
    expected = []
    for row, r in zip(table, in_order, strict=True):
        end = r.context_len + r.query_len
        used = -(-end // BLOCK_SIZE)
        assert row[:used].tolist() == r.block_ids[0][:used].tolist()
        expected += [
            r.block_ids[0][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for position in range(r.context_len, end)
        ]
    assert slots.tolist() == expected
    assert (query_lens.dtype, context_lens.dtype, table.dtype, slots.dtype) == (*[np.int32] * 3, np.int64)
    assert step.num_tokens == len(expected)
    leading = 0
    while leading < len(in_order) and in_order[leading].query_len == 1 and in_order[leading].context_len:
        leading += 1
    assert num_decodes == step.num_decodes == leading


def test_chunks_of_prompts_follow_the_decodes() -> None:
    step = Step(
        plan(request(5, 1, [1]), request(0, 3, [2]), request(40, 2, [3, 4]), request(0, 1, [5])), GEOMETRY
    )
    assert step.num_decodes == step.first_chunk_token == 1
    assert step.chunks.lengths == [3, 2, 1]
    [group] = step.groups
    assert group.context_rows == [ContextRows(3, 0, 2)]
    assert group.num_context_rows == 2


def test_groups_have_their_own_blocks_and_context() -> None:
    """A window and chunks hide the context from a chunk's later rows; a layer may attend another's k and v."""
    caches = (CacheSpec(32, 1, 32, 32, "float32"), CacheSpec(16, 1, 32, 32, "float32"))
    layers = (
        LayerSpec(0, 0, 0, 2, 0.1),
        LayerSpec(1, 1, 0, 2, 0.1, window=8),
        LayerSpec(0, 2, 0, 2, 0.1, chunk=48),
        LayerSpec(1, 1, 0, 2, 0.1, window=8, stores=False),
    )
    requests = [(40, 1), (40, 30), (50, 3), (0, 4)]
    tables = [
        [[10 * i + j for j in range(6)], [100 + 10 * i + j for j in range(6)], [200 + i] * 6]
        for i in range(4)
    ]
    parts = [
        PlannedRequest(context, query, tuple(np.array(ids, np.int32) for ids in table))
        for (context, query), table in zip(requests, tables, strict=True)
    ]
    step = Step(plan(*parts), Geometry(caches, layers))
    full, window, chunk = step.groups
    assert full.context_rows == [ContextRows(0, 0, 30), ContextRows(30, 30, 3)]
    assert window.context_rows == [ContextRows(0, 0, 7), ContextRows(30, 7, 3)]
    assert chunk.context_rows == [ContextRows(0, 0, 8), ContextRows(30, 8, 3)]
    assert [group.num_context_rows for group in step.groups] == [33, 10, 11]
    assert [group.slot_mapping[0] for group in step.groups] == [1 * 32 + 8, 102 * 16 + 8, 200 * 32 + 8]
    assert step.group_of(3) is window
    k, v = torch.randn(2, step.num_tokens, 1, 32).unbind()
    chunks = slice(1, None)
    for mine, theirs in zip(step.keep(1, k, v), (k[chunks], v[chunks]), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    expected = k[chunks].clone(), v[chunks].clone()
    k.zero_(), v.zero_()
    for mine, theirs in zip(step.keep(3, None, None), expected, strict=True):
        assert torch.equal(mine, theirs)
    step.keep(0, k, v)
    assert list(step.kept) == [(1, 0)]


def test_blocks_are_kept_from_step_to_step() -> None:
    planner = StepPlanner([0, 1])

    def step(*requests: ScheduledRequest, finished: tuple[str, ...] = ()) -> dict[str, list[list[int]]]:
        scheduled = ScheduledStep(0, 1, requests, set(finished), set(), (), (), (), (), None)
        planned = planner.plan(scheduled)
        return {name: [ids.tolist() for ids in part.block_ids] for name, part in planned.items()}

    first = planner.plan(
        ScheduledStep(
            0,
            40,
            [ScheduledRequest("a", 0, 40, [[3, 4], [5]], True, True)],
            set(),
            set(),
            (),
            (),
            (),
            (),
            None,
        )
    )
    assert step(ScheduledRequest("a", 40, 1, [], False, False)) == {"a": [[3, 4], [5]]}
    assert step(ScheduledRequest("a", 64, 1, [[9], []], False, False)) == {"a": [[3, 4, 9], [5]]}
    assert [ids.tolist() for ids in first["a"].block_ids] == [[3, 4], [5]], "a step in flight changed"
    # Preempted, and resumed with other blocks.
    assert step(ScheduledRequest("a", 0, 65, [[7, 8, 1], [6]], True, False)) == {"a": [[7, 8, 1], [6]]}
    # Another request of the same name.
    assert step(ScheduledRequest("a", 0, 1, [[2], [0]], True, True), finished=("a",)) == {"a": [[2], [0]]}
    assert step(finished=("a",)) == {}
    with pytest.raises(KeyError):
        step(ScheduledRequest("a", 1, 1, [], False, False))


@pytest.fixture
def exchange() -> Any:
    exchange = Exchange(device_for("cpu"), timeout=60.0).activate()
    yield exchange
    exchange.deactivate()


def builder() -> LaminaMetadataBuilder:
    made = object.__new__(LaminaAttentionBackend.get_builder_cls())
    made.exchange, made.lane = Exchange.current(), 1
    return made


def test_building_sends_nothing_and_may_be_repeated(exchange: Exchange) -> None:
    client = Client()
    exchange.open(HostLayers(client, 60.0, ranks_wait=False), ["layer"], GEOMETRY)  # type: ignore[arg-type]
    with exchange.running(1, plan(request(5, 1, [1]))):
        one, other = (builder().build(0, WHATEVER) for _ in range(2))
        assert one.step is other.step is not None
    assert client.steps == []
    assert builder().build(0, WHATEVER).step is None, "the step is over"


@pytest.mark.parametrize("has_metadata", [False, True])
def test_without_a_step_nothing_is_attended(exchange: Exchange, has_metadata: bool) -> None:
    """As when vLLM profiles, warms up or captures; memory may hold anything then."""
    impl = LaminaAttentionImpl(2, 32, 0.1, 1)
    q, kv = torch.ones(4, 2, 32), torch.ones(4, 1, 32)
    output = torch.full((4, 2, 32), torch.nan)
    metadata = LaminaMetadata(exchange, 0, None) if has_metadata else None
    impl.forward(None, q, kv, kv, torch.empty(0), metadata, output)  # type: ignore[arg-type]
    assert not output.any()


def test_spans_are_rows_of_the_chunks() -> None:
    """Of a decode none, of the chunks those that are whole, and what a step before has begun."""
    step = Step(plan(request(50, 1, [0, 1]), request(0, 30, [2]), request(40, 20, [3, 4])), GEOMETRY)
    ranges = {0: [(3, 9)], 1: [(4, 7), (20, 29)], 2: [(10, 20), (35, 44)]}
    assert step.spans(ranges) == [(4, 8), (20, 30), (30, 35)]
    with pytest.raises(LaminaError, match=r"Tokens 55 to 60 .* before token 60"):
        step.spans({2: [(55, 60)]})


@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_spans_see_each_other_whole(soft_cap: float) -> None:
    """With a window, and several tiles of queries, against scores that are masked one by one."""
    torch.manual_seed(0)
    shape = LayerShape(4, 2, 32, 32, 0.2, torch.float32, window=300, soft_cap=soft_cap)
    q, k, v = torch.randn(700, 4, 32), torch.randn(700, 2, 32), torch.randn(700, 2, 32)
    spans, chunks = [(3, 9), (20, 290), (400, 401), (650, 700)], Chunks([600, 100], [0, 0])
    attend = device_for("cpu").local_attention(shape)
    out, lse = with_spans(attend, spans, shape)(q, k, v, chunks)
    rows = torch.arange(700)
    distance = rows - rows[:, None]
    seen = (distance <= 0) & (distance > -300) & ((rows < 600) == (rows[:, None] < 600))
    for first, end in spans:
        seen[first:end, first:end] |= distance[first:end, first:end] > 0
    scores = torch.einsum("nhd,mhd->nhm", q.double(), k.double().repeat_interleave(2, 1)) * 0.2
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    expected = torch.einsum("nhm,mhd->nhd", scores.softmax(-1), v.double().repeat_interleave(2, 1))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-4)
