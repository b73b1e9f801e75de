"""Storms are those of their seed, and can be survived; wrong answers are noticed."""

from __future__ import annotations

import asyncio
import socket
from itertools import islice

import pytest
from clients import Reply
from layouts import EMBEDDED, EVERY, HOSTS, Layout
from questions import Question
from storms import LEASE, LONGEST_OUTAGE, LONGEST_STORM, TO_CLIENTS, TO_LINKS, Kind, Storm, storms
from traffic import Asked, Traffic


@pytest.mark.parametrize("layout", EVERY, ids=str)
def test_a_storm_leaves_all_workers(layout: Layout) -> None:
    for seed in range(20):
        for storm in islice(storms(layout, seed), 20):
            free_at = dict.fromkeys(range(layout.num_machines), 0.0)
            for disturbance in storm.disturbances:
                assert disturbance.at >= 0
                assert disturbance.end <= LONGEST_STORM
                if disturbance.kind in TO_CLIENTS:
                    continue
                longest = LEASE + 3 if disturbance.kind == Kind.ENGINE_PAUSE else LONGEST_OUTAGE
                assert disturbance.seconds <= longest
                assert disturbance.kind not in TO_LINKS or layout.network == HOSTS
                if disturbance.kind != Kind.ENGINE_PAUSE:  # nobody is away twice at a time
                    assert disturbance.at >= free_at[disturbance.worker]
                    free_at[disturbance.worker] = disturbance.end


def test_the_same_seed_is_the_same_weather() -> None:
    layout = Layout.parse("sequence+spare@hosts")
    once, again, other = ([*islice(storms(layout, seed), 10)] for seed in (1, 1, 2))
    assert once == again != other
    assert [Storm.from_dict(storm.to_dict()) for storm in once] == once


def test_every_kind_of_disturbance_comes() -> None:
    def kinds(layout: str) -> set[Kind]:
        return {
            item.kind for storm in islice(storms(Layout.parse(layout), 0), 60) for item in storm.disturbances
        }

    assert kinds("head@hosts") == set(Kind)
    assert kinds(EMBEDDED) == set(Kind) - set(TO_LINKS)


def test_names_of_layouts() -> None:
    assert [Layout.parse(str(layout)) for layout in EVERY] == list(EVERY)
    for wrong in ("", "two@shm", "head@rdma", "embedded@shm", "embedded+spare", "head+spares@shm"):
        with pytest.raises(ValueError, match="no such layout"):
            Layout.parse(wrong)


@pytest.mark.parametrize(
    ("token_ids", "hung_up", "error", "noticed"),
    [
        ([7, 8, 9], False, None, False),
        ([7, 8], True, None, False),
        ([7, 8], False, None, True),
        ([7, 8, 9, 9], False, None, True),
        ([7, 1, 9], False, None, True),
        ([1], True, None, True),
        ([7, 8, 9], False, "APIConnectionError", True),
    ],
)
def test_wrong_replies_are_noticed(
    token_ids: list[int], hung_up: bool, error: str | None, noticed: bool
) -> None:
    reply = Reply(0.0, token_ids, ended_at=1.0, error=error, hung_up=hung_up)
    assert (Asked(0, Question([5], [7, 8, 9]), True, reply).failure is not None) == noticed


def test_a_question_that_nobody_answers_is_noticed() -> None:
    async def ask_the_deaf(url: str) -> None:
        async with Traffic(url, [Question([1, 2], [3, 4])], seed=0) as traffic:
            with pytest.raises(TimeoutError):
                await traffic.probe(deadline=0.5)

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        host, port = deaf.getsockname()
        asyncio.run(ask_the_deaf(f"http://{host}:{port}"))
