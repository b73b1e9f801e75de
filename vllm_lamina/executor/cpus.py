"""Which CPUs the model worker and the embedded attention worker run on."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from vllm_lamina.config import AUTO
from vllm_lamina.errors import ConfigError
from vllm_lamina.units import format_cpus, parse_cpus


@dataclass(frozen=True)
class CpuPlacement:
    """CPUs of either side, by ranks of the model; each rank has an embedded attention worker of its own.

    ``model_cpus`` is None where vLLM's own binding stands (also for a model on a GPU).
    """

    model_cpus: tuple[tuple[int, ...], ...] | None
    worker_cpus: tuple[tuple[int, ...], ...]
    shared: bool
    """Some CPU serves several of them: then nobody may spin on it."""


def place(
    *, allowed: Collection[int], worker_cpus: str, bind: str, model_on_cpu: bool, num_ranks: int = 1
) -> CpuPlacement:
    """Divide the CPUs of this host between the model workers and the attention workers.

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

    Raises
    ------
    ConfigError
        A list names CPUs that this process may not use, or leaves none for the model worker.
    """
    cpus = sorted(allowed)
    bound = [cpu for ranks in bind.split("|") for cpu in parse_cpus(ranks)] if _is_list(bind) else None
    if worker_cpus != AUTO:
        chosen = parse_cpus(worker_cpus)
        if outside := set(chosen) - set(cpus):
            raise ConfigError(
                f"lamina option 'worker_cpus': CPUs {format_cpus(outside)} are not available; this process may use "
                f"{format_cpus(cpus)}"
            )
        rest = [cpu for cpu in cpus if cpu not in chosen]
        if model_on_cpu and bound is None and not rest:
            raise ConfigError(
                f"lamina option 'worker_cpus': {worker_cpus} leaves no CPU of {format_cpus(cpus)} for the model worker"
            )
        model = bound if bound is not None else rest
    elif bound is not None:
        model = bound
        # Where the model worker was given every CPU, the attention worker shares its last one.
        chosen = [cpu for cpu in cpus if cpu not in bound] or cpus[-1:]
    elif model_on_cpu:
        half = (len(cpus) + 1) // 2
        model = cpus[:half]
        chosen = cpus[half:] or cpus[-1:]
    else:
        model = cpus[:2]
        chosen = cpus[2:] or cpus[-1:]
    binds_model = model_on_cpu and bound is None and bind != "nobind"
    workers = _parts(chosen, num_ranks)
    models = _parts(model, num_ranks) if binds_model else (tuple(model),)
    used = [cpu for part in (*models, *workers) for cpu in part]
    shared = len(set(used)) < len(used) or bind == "nobind"
    return CpuPlacement(models if binds_model else None, workers, shared)


def _parts(cpus: list[int], count: int) -> tuple[tuple[int, ...], ...]:
    """``count`` parts of about the same size; with too few CPUs, parts of one CPU that share."""
    if len(cpus) < count:
        return tuple((cpus[i % len(cpus)],) for i in range(count))
    ends = [len(cpus) * i // count for i in range(count + 1)]
    return tuple(tuple(cpus[begin:end]) for begin, end in itertools.pairwise(ends))


def _is_list(bind: str) -> bool:
    return bind not in (AUTO, "nobind", "")
