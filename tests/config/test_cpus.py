"""Which CPUs the two workers get."""

import pytest

from vllm_lamina.errors import ConfigError
from vllm_lamina.executor.cpus import CpuPlacement, place


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
