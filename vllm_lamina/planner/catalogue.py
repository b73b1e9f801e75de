"""Finds entries of the planner's catalogues by name, and says which names are near when there is none."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from vllm_lamina.errors import ConfigError

T = TypeVar("T")


@cache
def package_data(file_name: str) -> dict[str, Any]:
    """Read a TOML file that ships with the planner."""
    return tomllib.loads(files("vllm_lamina.planner").joinpath(file_name).read_text(encoding="utf-8"))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a user's TOML file.

    Raises
    ------
    ConfigError
        The file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def look_up(kind: str, name: str, entries: Mapping[str, T]) -> T:
    """Return the entry called `name`, ignoring case.

    Parameters
    ----------
    kind
        What the entries are, for the message: ``device``, ``model``, ``trace``.

    Raises
    ------
    ConfigError
        There is no such entry; the nearest names are given.
    """
    by_folded_name = {key.casefold(): value for key, value in entries.items()}
    if name.casefold() in by_folded_name:
        return by_folded_name[name.casefold()]
    near = difflib.get_close_matches(name.casefold(), by_folded_name, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"unknown {kind} {name!r}; {hint}Known: {', '.join(sorted(entries))}")
