"""Which CPUs the model worker and the embedded attention worker run on."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_lamina.config import AUTO
from vllm_lamina.errors import ConfigError
from vllm_lamina.host import SYSTEM_CPUS, cores_of
from vllm_lamina.units import format_cpus, parse_cpus

Cores = Sequence[tuple[int, ...]]
"""CPUs, by the core whose hyperthreads they are."""


@dataclass(frozen=True)
class CpuPlacement:
    """CPUs of either side, by ranks of the model; each rank has an embedded attention worker of its own.

    ``model_cpus`` is None where vLLM's own binding stands (also for a model on a GPU).
    """

    model_cpus: tuple[tuple[int, ...], ...] | None
    worker_cpus: tuple[tuple[int, ...], ...]
    shared: bool
    """Some CPU serves several of them: then nobody may spin on it."""
    shared_cores: tuple[tuple[int, ...], ...] = ()
    """Cores whose hyperthreads serve several of them."""


def place(
    *,
    allowed: Collection[int],
    worker_cpus: str,
    bind: str,
    model_on_cpu: bool,
    num_ranks: int = 1,
    system: Path = SYSTEM_CPUS,
) -> CpuPlacement:
    """Divide the CPUs of this host between the model workers and the attention workers.

    Each gets whole cores while there are enough: a thread that polls takes half of its core from the hyperthread beside
    it. So of a core that a list names in part, the other side does not get the rest, unless it would get nothing.

    Parameters
    ----------
    allowed
        CPUs this process may run on.
    worker_cpus
        The option of that name: a CPU list, or ``auto``.
    bind
        Value of ``VLLM_CPU_OMP_THREADS_BIND``: CPU lists separated by ``|``, ``auto`` or ``nobind``.
    model_on_cpu
        Whether the model itself computes on the CPU; if not it needs two CPUs for the engine and the launches.
    num_ranks
        Ranks of the model.
    system
        Where the system says which CPUs share a core.

    Raises
    ------
    ConfigError
        A list names CPUs that this process may not use, or leaves none for the model worker.
    """
    cpus = sorted(allowed)
    bound = [cpu for ranks in bind.split("|") for cpu in parse_cpus(ranks)] if _is_list(bind) else None
    cores = cores_of([*cpus, *sorted(set(bound or ()) - set(cpus))], system)
    model: Cores
    worker: Cores
    if worker_cpus != AUTO:
        chosen = parse_cpus(worker_cpus)
        if outside := set(chosen) - set(cpus):
            raise ConfigError(
                f"lamina option 'worker_cpus': CPUs {format_cpus(outside)} are not available; this process may use "
                f"{format_cpus(cpus)}"
            )
        worker, model = cores_of(chosen, system), _rest(cores, chosen)
        if model_on_cpu and bound is None and not model:
            raise ConfigError(
                f"lamina option 'worker_cpus': {worker_cpus} leaves no CPU of {format_cpus(cpus)} for the model worker"
            )
    elif bound is not None:
        # Where the model worker was given every CPU, the attention worker shares its last one.
        worker = _rest(cores, bound) or [(cpus[-1],)]
    else:
        model, worker = _split(cores, (len(cpus) + 1) // 2, num_ranks) if model_on_cpu else _split(cores, 2)
    if bound is not None:
        model = [tuple(bound)]
    binds_model = model_on_cpu and bound is None and bind != "nobind"
    workers = _parts(worker, num_ranks)
    models = _parts(model, num_ranks) if binds_model else (tuple(itertools.chain(*model)),)
    parts = [*models, *workers]
    used = [cpu for part in parts for cpu in part]
    shared = len(set(used)) < len(used) or bind == "nobind"
    shared_cores = (
        core for core in cores if len(core) > 1 and sum(not set(core).isdisjoint(part) for part in parts) > 1
    )
    return CpuPlacement(models if binds_model else None, workers, shared, tuple(shared_cores))


def _rest(cores: Cores, taken: Collection[int]) -> Cores:
    """The cores of which nothing is taken; if there are none, what is left of the others."""
    left = [tuple(cpu for cpu in core if cpu not in taken) for core in cores]
    return [core for core in cores if core in left] or [core for core in left if core]


def _split(cores: Cores, target: int, least: int = 1) -> tuple[Cores, Cores]:
    """The first cores, with about ``target`` CPUs, and the others; ``least`` cores each, where there are as many.

    Of a single core, its hyperthreads.
    """
    if len(cores) == 1:
        cores = [(cpu,) for cpu in cores[0]]
    sizes = list(itertools.accumulate(map(len, cores)))
    if sizes[-1] <= target:
        return cores, [cores[-1][-1:]]
    counts = range(least, len(cores) - least + 1) or range(1, len(cores))
    count = min(counts, key=lambda i: (abs(sizes[i - 1] - target), -i))
    return cores[:count], cores[count:]


def _parts(cores: Cores, count: int) -> tuple[tuple[int, ...], ...]:
    """``count`` parts of as many cores, nearly; with too few cores, of as many CPUs; with too few CPUs, shared ones."""
    if len(cores) < count:
        cores = [(cpu,) for core in cores for cpu in core]
    if len(cores) < count:
        return tuple(cores[i % len(cores)] for i in range(count))
    ends = [len(cores) * i // count for i in range(count + 1)]
    return tuple(tuple(sorted(itertools.chain(*cores[begin:end]))) for begin, end in itertools.pairwise(ends))


def _is_list(bind: str) -> bool:
    return bind not in (AUTO, "nobind", "")
