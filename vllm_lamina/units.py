"""Sizes and CPU lists as people write them: ``4GiB``, ``0-3,6``."""

import re
from collections.abc import Iterable

_UNITS = {
    "": 1,
    "B": 1,
    "K": 2**10,
    "KIB": 2**10,
    "KB": 10**3,
    "M": 2**20,
    "MIB": 2**20,
    "MB": 10**6,
    "G": 2**30,
    "GIB": 2**30,
    "GB": 10**9,
    "T": 2**40,
    "TIB": 2**40,
    "TB": 10**12,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Read a size in bytes.

    Parameters
    ----------
    text
        A number and an optional unit, upper or lower case: ``4GiB`` and ``4G`` are 4 * 2**30, ``4GB`` is
        4 * 10**9, ``4096`` is 4096.

    Raises
    ------
    ValueError
        If the text is not such a size.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB, 4GiB or 1.5TB")
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def format_bytes(num_bytes: int) -> str:
    """Write a size for people, with about three significant digits: ``4 GiB``, ``1.5 MiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB" if abs(value) < 1000 else f"{value:.0f} TiB"


def format_enough_bytes(num_bytes: int) -> str:
    """Write a size of ``num_bytes`` or a little more like `format_bytes`: one that a user is told to give."""
    text = format_bytes(num_bytes)
    # A size rounded down is at most half a percent too small: 1.00 for 1.005.
    return text if parse_bytes(text) >= num_bytes else format_bytes(num_bytes + num_bytes // 200 + 1)


def parse_cpus(text: str) -> list[int]:
    """Read a CPU list in the kernel's notation.

    Parameters
    ----------
    text
        Numbers and ranges, separated by commas: ``0-3,6`` is ``[0, 1, 2, 3, 6]``. The order is kept.

    Raises
    ------
    ValueError
        If the text is not such a list, or names a CPU twice.
    """
    cpus: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r} is not a list of CPUs; write for example 0-3,6")
        cpus.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    if len(set(cpus)) != len(cpus):
        raise ValueError(f"{text!r} names a CPU twice")
    return cpus


def format_cpus(cpus: Iterable[int]) -> str:
    """Write a CPU list in the kernel's notation, sorted: ``[3, 0, 1, 2, 6]`` becomes ``0-3,6``."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
