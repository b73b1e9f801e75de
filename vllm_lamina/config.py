"""Every option of Lamina, declared once: CLI flags, keyword arguments and ``additional_config`` derive from it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vllm_lamina.errors import ConfigError
from vllm_lamina.units import parse_bytes, parse_cpus

AUTO = "auto"
ALWAYS = "always"


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
        "Address host:port of a running attention worker (`vllm-lamina worker`) on this host. Empty, the default, "
        "starts one as a child of the engine.",
    )
    memory: str = _option(
        AUTO,
        "Memory of the embedded attention worker's KV pool, such as 4GiB. `auto` takes 70%% of the memory that is free "
        "once the model is loaded.",
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
        "Seconds that one exchange with an attention worker may take before the engine gives up on it.",
    )

    def __post_init__(self) -> None:
        if self.memory != AUTO:
            with _naming("memory"):
                parse_bytes(self.memory)
        if self.worker_cpus != AUTO:
            with _naming("worker_cpus"):
                parse_cpus(self.worker_cpus)
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float) or self.timeout <= 0:
            raise ConfigError(
                f"lamina option 'timeout' must be a number of seconds above 0, not {self.timeout!r}"
            )
        if self.batches not in (1, 2):
            raise ConfigError(f"lamina option 'batches' must be 1 or 2, not {self.batches!r}")
        if self.stagger not in (AUTO, ALWAYS):
            raise ConfigError(f"lamina option 'stagger' must be {AUTO!r} or {ALWAYS!r}, not {self.stagger!r}")
        if self.workers and (self.memory != AUTO or self.worker_cpus != AUTO):
            raise ConfigError(
                "lamina options 'memory' and 'worker_cpus' describe the embedded attention worker; with "
                f"workers={self.workers!r} give them to `vllm-lamina worker` instead"
            )

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


class _naming:
    """Adds the option's name to a ValueError raised while its value is read."""

    def __init__(self, option: str) -> None:
        self.option = option

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ValueError):
            raise ConfigError(f"lamina option {self.option!r}: {error}") from error
