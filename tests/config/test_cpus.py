"""Which CPUs the two workers get."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.cpus import CpuPlacement
from vllm_lamina.executor.cpus import place as place_by_system
from vllm_lamina.host import cores_of
from vllm_lamina.units import format_cpus

# Each CPU is a core of its own where the system does not say.
place = functools.partial(place_by_system, system=Path("/nonexistent"))


@pytest.mark.parametrize(
    ("allowed", "worker_cpus", "bind", "model_on_cpu", "expected"),
    [
        # By default each side has half of the CPUs; the model worker's half is the larger.
        ({0, 1}, "auto", "auto", True, CpuPlacement(((0,),), ((1,),), False)),
        (set(range(8, 13)), "auto", "auto", True, CpuPlacement(((8, 9, 10),), ((11, 12),), False)),
        # Each list that the user gives stands, and the other side gets the rest.
        ({0, 1, 2, 3}, "0", "auto", True, CpuPlacement(((1, 2, 3),), ((0,),), False)),
        ({0, 1, 2, 3}, "auto", "0-2", True, CpuPlacement(None, ((3,),), False)),
        ({0, 1, 2, 3}, "2-3", "0-1", True, CpuPlacement(None, ((2, 3),), False)),
        ({0, 1, 2, 3}, "auto", "0|2", True, CpuPlacement(None, ((1, 3),), False)),
        # Shared CPUs are possible, and known.
        ({0}, "auto", "auto", True, CpuPlacement(((0,),), ((0,),), True)),
        ({0, 1}, "auto", "0-1", True, CpuPlacement(None, ((1,),), True)),
        ({0, 1}, "1", "0-1", True, CpuPlacement(None, ((1,),), True)),
        ({0, 1}, "1", "nobind", True, CpuPlacement(None, ((1,),), True)),
        # A model on a GPU leaves all CPUs but two to the attention worker.
        (set(range(8)), "auto", "auto", False, CpuPlacement(None, ((2, 3, 4, 5, 6, 7),), False)),
    ],
)
def test_placement(
    allowed: set[int], worker_cpus: str, bind: str, model_on_cpu: bool, expected: CpuPlacement
) -> None:
    assert place(allowed=allowed, worker_cpus=worker_cpus, bind=bind, model_on_cpu=model_on_cpu) == expected


def test_cpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="CPUs 7 are not available; this process may use 0-1"):
        place(allowed={0, 1}, worker_cpus="1,7", bind="auto", model_on_cpu=True)


def test_the_model_worker_needs_a_cpu() -> None:
    with pytest.raises(ConfigError, match="0-1 leaves no CPU of 0-1 for the model worker"):
        place(allowed={0, 1}, worker_cpus="0-1", bind="auto", model_on_cpu=True)


@pytest.mark.parametrize(
    ("allowed", "bind", "expected"),
    [
        (set(range(8)), "auto", CpuPlacement(((0, 1), (2, 3)), ((4, 5), (6, 7)), False)),
        (set(range(5)), "auto", CpuPlacement(((0,), (1, 2)), ((3,), (4,)), False)),
        # Too few CPUs are shared.
        ({0, 1}, "auto", CpuPlacement(((0,), (0,)), ((1,), (1,)), True)),
        ({0, 1, 2, 3}, "0|1", CpuPlacement(None, ((2,), (3,)), False)),
        ({0, 1}, "0|1", CpuPlacement(None, ((1,), (1,)), True)),
    ],
)
def test_each_rank_has_its_part(allowed: set[int], bind: str, expected: CpuPlacement) -> None:
    placement = place(allowed=allowed, worker_cpus="auto", bind=bind, model_on_cpu=True, num_ranks=2)
    assert placement == expected


def machine(system: Path, cores: Iterable[Collection[int]], name: str = "core_cpus_list") -> Path:
    """Write what the system says of these cores, as Linux does."""
    for core in cores:
        for cpu in core:
            topology = system / f"cpu{cpu}" / "topology"
            topology.mkdir(parents=True)
            (topology / name).write_text(f"{format_cpus(core)}\n")
    return system


@pytest.mark.parametrize(
    ("cores", "options", "expected"),
    [
        # As most machines number them; two to a core; four to a core, as on POWER.
        (
            [(i, i + 4) for i in range(4)],
            {},
            CpuPlacement(((0, 1, 4, 5),), ((2, 3, 6, 7),), False),
        ),
        ([(0, 1), (2, 3), (4, 5)], {}, CpuPlacement(((0, 1, 2, 3),), ((4, 5),), False)),
        (
            [range(4), range(4, 8), range(8, 12)],
            {},
            CpuPlacement((tuple(range(8)),), ((8, 9, 10, 11),), False),
        ),
        # Each rank has whole cores, too.
        (
            [(i, i + 4) for i in range(4)],
            {"num_ranks": 2},
            CpuPlacement(((0, 4), (1, 5)), ((2, 6), (3, 7)), False),
        ),
        # Of one core of which this process has both CPUs, and two of which it has one.
        ([(0, 4), (1, 5), (2, 6)], {"allowed": {0, 1, 5, 6}}, CpuPlacement(((0, 1, 5),), ((6,),), False)),
        # A model on a GPU.
        (
            [(i, i + 4) for i in range(4)],
            {"model_on_cpu": False},
            CpuPlacement(None, ((1, 2, 3, 5, 6, 7),), False),
        ),
        # Of the cores that a list names in part, the other side does not get the rest.
        (
            [(i, i + 4) for i in range(4)],
            {"worker_cpus": "2-3"},
            CpuPlacement(((0, 1, 4, 5),), ((2, 3),), False),
        ),
        ([(i, i + 4) for i in range(4)], {"bind": "0-2"}, CpuPlacement(None, ((3, 7),), False)),
        # Unless it would get nothing; also a single core is divided, and a rank's that has too few.
        (
            [(0, 2), (1, 3)],
            {"worker_cpus": "0-1"},
            CpuPlacement(((2, 3),), ((0, 1),), False, ((0, 2), (1, 3))),
        ),
        ([(0, 2), (1, 3)], {"bind": "0-1"}, CpuPlacement(None, ((2, 3),), False, ((0, 2), (1, 3)))),
        ([(0, 1)], {}, CpuPlacement(((0,),), ((1,),), False, ((0, 1),))),
        (
            [(0, 2), (1, 3)],
            {"num_ranks": 2},
            CpuPlacement(((0,), (2,)), ((1,), (3,)), False, ((0, 2), (1, 3))),
        ),
        # A user's lists stand.
        (
            [(0, 2), (1, 3)],
            {"worker_cpus": "2", "bind": "0,1,3"},
            CpuPlacement(None, ((2,),), False, ((0, 2),)),
        ),
        # A CPU that this process may not use now, but the model worker is bound to.
        (
            [(0, 2), (1, 3)],
            {"allowed": {2, 3}, "bind": "0"},
            CpuPlacement(None, ((3,),), False),
        ),
    ],
)
def test_hyperthreads(
    cores: list[Collection[int]], options: dict[str, Any], expected: CpuPlacement, tmp_path: Path
) -> None:
    defaults = {"allowed": {cpu for core in cores for cpu in core}, "worker_cpus": "auto", "bind": "auto"}
    given = {"model_on_cpu": True, "system": machine(tmp_path, cores)} | defaults | options
    assert place_by_system(**given) == expected


def test_older_kernels_name_cores_otherwise(tmp_path: Path) -> None:
    machine(tmp_path, [(0, 2)], "thread_siblings_list")
    assert cores_of([0, 1, 2], tmp_path) == [(0, 2), (1,)]


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], set[int]]:
    """Cores of one to four hyperthreads, in any numbering, and which CPUs of them a process may use."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=6))
    numbers = iter(draw(st.permutations(range(sum(sizes)))))
    cores = [tuple(next(numbers) for _ in range(size)) for size in sizes]
    return cores, draw(st.sets(st.integers(0, sum(sizes) - 1), min_size=1))


@given(machines(), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_core_is_shared_while_there_are_enough(
    tmp_path_factory: pytest.TempPathFactory,
    cores_and_allowed: tuple[list[tuple[int, ...]], set[int]],
    num_ranks: int,
    model_on_cpu: bool,
) -> None:
    all_cores, allowed = cores_and_allowed
    placed = place_by_system(
        allowed=allowed,
        worker_cpus="auto",
        bind="auto",
        model_on_cpu=model_on_cpu,
        num_ranks=num_ranks,
        system=machine(tmp_path_factory.mktemp("system"), all_cores),
    )
    cores = [found for core in all_cores if (found := allowed.intersection(core))]
    workers = set().union(*placed.worker_cpus)
    if not model_on_cpu:
        rest = allowed - workers
        assert len(allowed) <= 2 or rest
        assert len(cores) == 1 or len(allowed) <= 2 or not [c for c in cores if c & rest and c & workers]
        return
    assert placed.model_cpus is not None
    model = set().union(*placed.model_cpus)
    assert model | workers == allowed
    parts = [*placed.model_cpus, *placed.worker_cpus]
    shared = [core for core in cores if sum(not core.isdisjoint(part) for part in parts) > 1]
    assert {tuple(sorted(core)) for core in placed.shared_cores} == {
        tuple(sorted(core)) for core in shared if len(core) > 1
    }
    if len(cores) > 1:
        assert not [core for core in cores if core & model and core & workers]
    if len(cores) >= 2 * num_ranks:
        assert not shared
    if num_ranks == 1:
        assert abs(len(model) - (len(allowed) + 1) // 2) < max(map(len, cores))
