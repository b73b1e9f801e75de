"""What an engine asks of Ray, and what it gets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import vllm_lamina
from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import LaminaError
from vllm_lamina.units import format_bytes, parse_bytes

NAMESPACE = "vllm-lamina"
"""Ray's namespace of all deployments."""

RESOURCE_STEP = 10_000
"""Ray counts resources in ten-thousandths."""


def actor_name(name: str, index: int) -> str:
    """Ray's name of the actor of a deployment's attention worker."""
    return f"{name}/{index}"


class DeploymentError(LaminaError):
    """The attention workers cannot be had from Ray; the text is one line that says what to change."""


@dataclass(frozen=True)
class Shape:
    """What the attention workers of a deployment are; an engine joins a deployment of the same shape only.

    ``port`` is the first that is tried, ``version`` that of vllm-lamina on the engine's side.
    """

    workers: int
    memory_bytes: int
    cpus: int
    resource: str
    port: int
    version: str = vllm_lamina.__version__

    @property
    def gibibytes(self) -> float:
        """Amount of the custom resource that a worker takes, not less than its memory."""
        return -(-self.memory_bytes * RESOURCE_STEP // 2**30) / RESOURCE_STEP

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one worker."""
        return {self.resource: self.gibibytes, "CPU": self.cpus}

    def __str__(self) -> str:
        return (
            f"{self.workers} attention worker{'s' if self.workers > 1 else ''} of {format_bytes(self.memory_bytes)} "
            f"({self.resource}) and {self.cpus} CPU{'s' if self.cpus > 1 else ''} from port {self.port}, "
            f"vllm-lamina {self.version}"
        )


@dataclass(frozen=True)
class Deployment:
    """A deployment as an engine asks for it: on which cluster, of which name and shape, and for how long."""

    address: str
    name: str
    shape: Shape
    idle_seconds: float
    wait_seconds: float
    secret_file: str

    @classmethod
    def asked_for(cls, options: LaminaConfig) -> Self:
        """The deployment of an engine's options, which ask for Ray."""
        memory, cpus = parse_bytes(options.memory), options.ray_cpus
        shape = Shape(options.ray_workers, memory, cpus, options.ray_resource, options.ray_port)
        return cls(
            options.ray,
            options.ray_name,
            shape,
            options.ray_idle_seconds,
            options.ray_wait_seconds,
            options.secret_file,
        )


def up_flags() -> dict[str, dataclasses.Field[object]]:
    """Flags of ``vllm-lamina ray up`` and the engine's options that they are: ``--lamina-ray-*`` without the prefix."""
    return {
        "--" + field.name.removeprefix("ray_").replace("_", "-"): field
        for field in dataclasses.fields(LaminaConfig)
        if field.name == "memory" or (field.name.startswith("ray_") and field.name != "ray_name")
    }


@dataclass(frozen=True)
class WorkerInfo:
    """What an actor says of its attention worker.

    Attributes
    ----------
    node
        Id of Ray's node.
    version
        Of vllm-lamina there.
    address
        Of the worker; empty until it has answered there.
    pid
        Of the worker's process; 0 while there is none.
    engine
        The connected engine; empty if there is none.
    idle_for
        Seconds since an engine was connected, or was about to be.
    restarts
        How often the worker was started again.
    error
        Why it does not run; empty if it does, or has not been tried.
    """

    index: int
    shape: Shape
    node: str
    version: str
    address: str
    pid: int
    engine: str
    idle_for: float
    restarts: int
    error: str
