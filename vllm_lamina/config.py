"""Every option of Lamina, declared once: CLI flags, keyword arguments and ``additional_config`` derive from it."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from vllm_lamina.errors import ConfigError
from vllm_lamina.units import parse_bytes, parse_cpus

AUTO = "auto"
ALWAYS = "always"
HEAD, SEQUENCE, REQUEST = "head", "sequence", "request"
TransportOption = Literal["auto", "shm", "ucx"]


def _option(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class LaminaConfig:
    """Options of one engine.

    A field ``x`` is ``--lamina-x`` on the command line, ``lamina_x=`` in Python and ``{"lamina": {"x": ...}}`` in
    vLLM's ``--additional-config``.

    Raises
    ------
    ConfigError
        A value cannot be read or is out of range.
    """

    workers: str = _option(
        "",
        "Addresses host:port of running attention workers (`vllm-lamina worker`), separated by commas. Empty, the "
        "default, starts one as a child of the engine.",
    )
    spares: str = _option(
        "",
        "Addresses host:port of running attention workers that take the place of one that is lost, separated by "
        "commas.",
    )
    partition: str = _option(
        AUTO,
        "How several attention workers divide the KV cache: `head`, each holds some KV heads of all tokens; "
        "`sequence`, the blocks of each request go round; `request`, each request is on one as long as it has room. "
        "`auto` chooses by heads, pool sizes and request length.",
    )
    secret_file: str = _option(
        "",
        "Secret file of the running attention workers, which those on other machines require; `vllm-lamina secret` "
        "makes one.",
    )
    transport: TransportOption = _option(
        AUTO,
        "How q, k, v and outputs travel: `shm` (shared memory, on one host), `ucx`, or `auto`, shared memory where it "
        "reaches the attention worker and UCX elsewhere.",
    )
    memory: str = _option(
        AUTO,
        "Memory of the embedded attention worker's KV pool, such as 4GiB. `auto` takes 70%% of the memory that is free "
        "once the model is loaded. With --lamina-ray that of each attention worker, and needed.",
    )
    worker_cpus: str = _option(
        AUTO,
        "CPUs of the embedded attention worker, such as 8-15 or 1,3; one thread runs on each. `auto` takes CPUs that "
        "the model worker does not use.",
    )
    batches: int = _option(
        2,
        "Batches in flight: with 2 the model worker computes one while the attention worker attends the other; 1 turns "
        "that off.",
    )
    stagger: str = _option(
        AUTO,
        "When two batches are in flight: `auto`, where they are faster than one by what the steps so far have cost, or "
        "`always`, with two requests or more.",
    )
    timeout: float = _option(
        300.0,
        "Seconds that one exchange with an attention worker may take before the worker counts as lost.",
    )
    heartbeat_timeout: float = _option(
        0.0,
        "Seconds without a sign of life after which an attention worker counts as lost; 0 for 1 second where it is on "
        "this host and 3 where it is not.",
    )
    recovery_timeout: float = _option(
        60.0,
        "Seconds for which the engine tries to get a lost attention worker back, or a spare, before it gives up; "
        "requests wait meanwhile.",
    )
    ray: str = _option(
        "",
        "Ray cluster that runs the attention workers: `auto`, the one of this node; host:port; or ray://host:port from "
        "a machine that is not one of its nodes. Empty, the default: no Ray.",
    )
    ray_workers: int = _option(1, "Attention workers that Ray places, on different nodes as far as it can.")
    ray_resource: str = _option(
        "lamina_memory",
        "Custom resource of Ray, in GiB, that nodes offer for KV pools: `ray start --resources "
        "'{\"lamina_memory\": 200}'`.",
    )
    ray_cpus: int = _option(1, "CPUs of each attention worker on Ray, one thread each.")
    ray_name: str = _option(
        "lamina",
        "Name of the deployment on Ray: an engine that is started again finds its attention workers by it. One engine "
        "each.",
    )
    ray_port: int = _option(
        7100,
        "First TCP port that attention workers on Ray try; one that finds it taken goes on to higher ones.",
    )
    ray_idle_seconds: float = _option(
        300.0,
        "Seconds without an engine after which a deployment on Ray removes itself.",
    )
    ray_wait_seconds: float = _option(
        60.0,
        "Seconds to wait until Ray has the resources; more where new nodes are started for them.",
    )

    def __post_init__(self) -> None:
        if self.memory != AUTO:
            with _naming("memory"):
                parse_bytes(self.memory)
        if self.worker_cpus != AUTO:
            with _naming("worker_cpus"):
                parse_cpus(self.worker_cpus)
        for option in (
            "timeout",
            "ray_idle_seconds",
            "ray_wait_seconds",
            "heartbeat_timeout",
            "recovery_timeout",
        ):
            seconds = getattr(self, option)
            number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            may_be_0 = option in ("heartbeat_timeout", "recovery_timeout")
            if not number or seconds < 0 or (seconds == 0 and not may_be_0):
                least = "of at least 0" if may_be_0 else "above 0"
                raise ConfigError(
                    f"lamina option {option!r} must be a number of seconds {least}, not {seconds!r}"
                )
        if self.batches not in (1, 2):
            raise ConfigError(f"lamina option 'batches' must be 1 or 2, not {self.batches!r}")
        if self.stagger not in (AUTO, ALWAYS):
            raise ConfigError(f"lamina option 'stagger' must be {AUTO!r} or {ALWAYS!r}, not {self.stagger!r}")
        if self.partition not in (AUTO, HEAD, SEQUENCE, REQUEST):
            raise ConfigError(
                f"lamina option 'partition' must be {AUTO!r}, {HEAD!r}, {SEQUENCE!r} or {REQUEST!r}, not "
                f"{self.partition!r}"
            )
        for name, others in (("workers", ()), ("spares", self.worker_addresses)):
            addresses = _addresses(getattr(self, name))
            if "" in addresses or len({*addresses, *others}) != len(addresses) + len(others):
                raise ConfigError(
                    f"lamina option {name!r} must name different addresses host:port, separated by commas, not "
                    f"{getattr(self, name)!r}"
                )
        if self.spares and not self.workers:
            raise ConfigError(
                "lamina option 'spares' goes with 'workers': an attention worker that the engine started itself is "
                "started again"
            )
        transports = get_args(TransportOption)
        if self.transport not in transports:
            raise ConfigError(
                f"lamina option 'transport' must be one of {', '.join(map(repr, transports))}, not {self.transport!r}"
            )
        if self.workers and (self.memory != AUTO or self.worker_cpus != AUTO):
            raise ConfigError(
                "lamina options 'memory' and 'worker_cpus' describe the embedded attention worker; with "
                f"workers={self.workers!r} give them to `vllm-lamina worker` instead"
            )
        self._check_ray()
        if self.ray:
            # All processes of an engine read the secret there; one of them writes it when the deployment is up.
            object.__setattr__(self, "secret_file", str(ray_secret_file(self.ray_name)))

    def _check_ray(self) -> None:
        for option in ("ray_workers", "ray_cpus", "ray_port"):
            number = getattr(self, option)
            if isinstance(number, bool) or not isinstance(number, int) or not 0 < number < 65536:
                raise ConfigError(f"lamina option {option!r} must be a number above 0, not {number!r}")
        if not self.ray:
            for field in dataclasses.fields(self):
                if field.name.startswith("ray_") and getattr(self, field.name) != field.default:
                    raise ConfigError(f"lamina option {field.name!r} needs 'ray', such as ray='auto'")
            return
        if self.ray != AUTO and not re.fullmatch(r"(ray://)?[^\s/]+:\d{1,5}", self.ray):
            raise ConfigError(
                f"lamina option 'ray' must be {AUTO!r}, host:port or ray://host:port of a Ray cluster, not {self.ray!r}"
            )
        for option in ("workers", "secret_file"):
            if getattr(self, option):
                raise ConfigError(
                    f"lamina options 'ray' and {option!r} exclude each other: Ray starts the attention workers, with a "
                    "secret of their own; remove one of the two"
                )
        if self.memory == AUTO:
            raise ConfigError(
                "lamina option 'ray' needs 'memory', the memory of each attention worker, such as 64GiB"
            )
        if self.worker_cpus != AUTO:
            raise ConfigError(
                "lamina option 'worker_cpus' describes the embedded attention worker; with 'ray' it is 'ray_cpus' that "
                "says how many CPUs each attention worker has"
            )
        for option in ("ray_name", "ray_resource"):
            if not re.fullmatch(r"\w[\w.-]{0,99}", getattr(self, option)):
                raise ConfigError(
                    f"lamina option {option!r} must be letters, digits, '_', '.' and '-', not {getattr(self, option)!r}"
                )

    @property
    def worker_addresses(self) -> tuple[str, ...]:
        """Addresses of the attention workers that run already; none where the engine starts its own."""
        return _addresses(self.workers)

    @property
    def spare_addresses(self) -> tuple[str, ...]:
        """Addresses of the attention workers that wait to take another one's place."""
        return _addresses(self.spares)

    def ranks_sharing_memory(self, num_ranks: int) -> int:
        """For how many of a model's ranks ``memory`` is: all where their attention workers are embedded."""
        return 1 if self.workers or self.ray else num_ranks

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Read the options that a user gave as ``{"name": value}``.

        Raises
        ------
        ConfigError
            A key is not an option (the nearest valid one is named), or a value is wrong.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for key in options:
            if key not in defaults:
                nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"unknown lamina option {key!r}; did you mean {nearest!r}? Valid options: {', '.join(defaults)}"
                )
        values: dict[str, Any] = {
            k: str(v) if isinstance(defaults[k], str) else v for k, v in options.items()
        }
        return cls(**values)

    @classmethod
    def from_additional_config(cls, additional_config: object) -> Self:
        """Read the ``lamina`` key of vLLM's ``additional_config``; defaults where there is none."""
        options = additional_config.get("lamina", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(options, Mapping):
            raise ConfigError(f'additional_config["lamina"] must be a mapping of options, not {options!r}')
        return cls.from_mapping(options)


def ray_secret_file(name: str) -> Path:
    """Where an engine keeps the secret of its deployment on Ray, between its own processes and for its operator."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "vllm-lamina" / f"ray-{name}.secret"


def _addresses(text: str) -> tuple[str, ...]:
    return tuple(address.strip() for address in text.split(",")) if text else ()


class _naming:
    """Adds the option's name to a ValueError raised while its value is read."""

    def __init__(self, option: str) -> None:
        self.option = option

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ValueError):
            raise ConfigError(f"lamina option {self.option!r}: {error}") from error
