"""Which CPUs the model worker and the embedded attention worker run on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vllm_lamina.config import AUTO
from vllm_lamina.errors import ConfigError
from vllm_lamina.units import format_cpus, parse_cpus


@dataclass(frozen=True)
class Placement:
    """CPUs of either side; ``model_cpus`` is None where vLLM's own binding stands (also for a model on a GPU)."""

    model_cpus: tuple[int, ...] | None
    worker_cpus: tuple[int, ...]
    shared: bool
    """Some CPU serves both: then nobody may spin on it."""


def place(*, allowed: Collection[int], worker_cpus: str, bind: str, model_on_cpu: bool) -> Placement:
    """Divide the CPUs of this host between the model worker and the attention worker.

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
    shared = bool(set(model) & set(chosen)) or bind == "nobind"
    binds_model = model_on_cpu and bound is None and bind != "nobind"
    return Placement(tuple(model) if binds_model else None, tuple(chosen), shared)


def _is_list(bind: str) -> bool:
    return bind not in (AUTO, "nobind", "")
