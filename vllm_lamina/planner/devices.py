"""Describes devices, networks, prices and what devices reach of their peaks, as data with its sources."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_lamina.errors import ConfigError

Array = NDArray[np.float64]
T = TypeVar("T")

PRICE_SETS = ("latest", "paper")


@dataclass(frozen=True)
class Curve:
    """A fraction of peak by batch size: linear in log2(batch) between points, constant outside them.

    Attributes
    ----------
    points
        Pairs (batch, fraction), batches at least 1 and increasing, fractions in (0, 1].
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        batches = [batch for batch, _ in self.points]
        if not batches or not batches[0] >= 1 or not all(a < b for a, b in pairwise([*batches, math.inf])):
            raise ConfigError(f"batches of an efficiency curve must be at least 1 and increase: {batches}")
        if any(not 0 < fraction <= 1 for _, fraction in self.points):
            raise ConfigError(f"efficiencies must be in (0, 1]: {self.points}")

    @classmethod
    def read(cls, value: float | Sequence[Sequence[float]]) -> Curve:
        """Read a constant, or a list of [batch, fraction]."""
        try:
            rows = ((1.0, value),) if isinstance(value, int | float) else value
            points = tuple((float(batch), float(fraction)) for batch, fraction in rows)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"an efficiency is a fraction or a list of [batch, fraction], not {value!r}"
            ) from error
        return cls(points)

    def at(self, batch: ArrayLike) -> Array:
        """Fraction of peak at each batch size."""
        batches, fractions = zip(*self.points, strict=True)
        interpolated: Array = np.interp(np.log2(np.maximum(batch, 1.0)), np.log2(batches), fractions)
        return interpolated


@dataclass(frozen=True)
class Efficiency:
    """What a device reaches of its peaks, by kind of work, and what its software adds to each step.

    Attributes
    ----------
    weight_mbu
        Memory bandwidth utilisation of reading weights in the non-attention operators.
    gemm_mfu
        Model FLOP/s utilisation of the non-attention operators where compute binds.
    attention_mbu
        Memory bandwidth utilisation of the attention operator.
    attention_mfu
        FLOP/s utilisation of the attention operator where compute binds.
    step_overhead
        Seconds of a step that depend on neither model nor batch (scheduling, sampling).
    layer_overhead
        Seconds that each layer adds whatever its size (launches, framework).
    sequence_overhead
        Seconds that each sequence of the batch adds to a step (input preparation, output handling).
    source
        Where the figures come from.
    """

    weight_mbu: Curve
    gemm_mfu: Curve
    attention_mbu: Curve
    attention_mfu: Curve
    step_overhead: float = 0.0
    layer_overhead: float = 0.0
    sequence_overhead: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Price:
    """US dollars for one hour of one device, with where and when that was asked."""

    usd: float
    source: str
    date: str


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes
    ----------
    key, name, kind
        Name in the catalogue, name for people, and ``gpu``, ``tpu`` or ``cpu``.
    flops, memory_bytes, memory_bandwidth
        F in FLOP/s (16 bit, dense), bytes, and M in bytes/s, all peaks.
    network_bandwidth, link_bandwidth
        Bytes/s, one way, of its NIC and of its link to the other devices of the machine; 0 where there is none.
    efficiency
        What it reaches of the peaks.
    prices
        In the order of the catalogue; empty if nobody stated one.
    """

    key: str
    name: str
    kind: str
    flops: float
    memory_bytes: float
    memory_bandwidth: float
    network_bandwidth: float
    link_bandwidth: float
    efficiency: Efficiency
    prices: tuple[Price, ...] = ()
    source: str = ""

    def price(self, price_set: str = "latest") -> Price:
        """Return the newest price, or the paper's.

        Raises
        ------
        ConfigError
            No price is known.
        """
        prices = [p for p in self.prices if price_set != "paper" or p.source.startswith("paper")]
        if not prices:
            raise ConfigError(
                f"no {'price of the paper' if price_set == 'paper' else 'price'} is known for {self.key} "
                f"({self.name}); give one in USD per hour: --price {self.key}=1.23"
            )
        return max(prices, key=lambda p: p.date)


@dataclass(frozen=True)
class Transport:
    """How q, k, v and the attention output travel.

    Attributes
    ----------
    round_trip
        Seconds of a small message there and its answer back, paid once per layer.
    utilisation
        Fraction of the line rate that large messages reach.
    """

    key: str
    name: str
    round_trip: float
    utilisation: float
    source: str = ""


@dataclass(frozen=True)
class Collective:
    """An all-reduce within one machine: seconds before the first byte, and fraction of the link's rate."""

    latency: float
    utilisation: float


@dataclass(frozen=True)
class Catalogue:
    """Everything `devices.toml` and the user's own file describe."""

    devices: Mapping[str, Device]
    transports: Mapping[str, Transport]
    collective: Collective

    def device(self, name: str) -> Device:
        """Find a device by name; a `ConfigError` gives the nearest names."""
        return look_up("device", name, self.devices)

    def transport(self, name: str) -> Transport:
        """Find a transport by name; a `ConfigError` gives the nearest names."""
        return look_up("transport", name, self.transports)

    def with_price(self, name: str, usd: float) -> Catalogue:
        """Return the catalogue with the user's own price for one device, which precedes all others."""
        device = self.device(name)
        priced = replace(device, prices=(Price(usd, "paper or latest: given by the user", "9999"),))
        return replace(self, devices={**self.devices, device.key: priced})


def read_catalogue(extra: Path | None = None) -> Catalogue:
    """Read the planner's catalogue and, over it, the tables of the user's file.

    A table of the user's file replaces the keys it gives; ``[device.NAME.efficiency]`` holds measured values, as
    `vllm-lamina plan calibrate` writes them.

    Raises
    ------
    ConfigError
        The file cannot be read, or one of its tables lacks a key, has one too many or a value that cannot be.
    """
    sections = package_data("devices.toml")
    if extra is not None:
        sections = _merged(sections, extra)
    kinds = {key: _efficiency(_Table(f"efficiency {key!r}", t)) for key, t in sections["efficiency"].items()}
    collective = _Table("collective", sections["collective"])
    latency, share = collective.number("latency_us", zero=True), collective.number("link_utilisation", most=1)
    collective.end()
    return Catalogue(
        devices={key: _device(key, table, kinds) for key, table in sections["device"].items()},
        transports={key: _transport(key, table) for key, table in sections["transport"].items()},
        collective=Collective(latency * 1e-6, share),
    )


def _merged(base: Mapping[str, Any], extra: Path) -> dict[str, Any]:
    try:
        user = tomllib.loads(extra.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {extra}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{extra} is not valid TOML: {error}") from error
    merged = {**base}
    for section, tables in user.items():
        if section not in base:
            raise ConfigError(f"{extra} has {section!r}, which is none of {', '.join(base)}")
        own = _Table(f"{section!r} of {extra}", tables).entries
        if section != "collective":
            known = base[section]
            own = {k: {**known.get(k, {}), **_Table(f"{section} {k!r}", t).entries} for k, t in own.items()}
        merged[section] = {**base[section], **own}
    return merged


class _Table:
    """A table being read: each entry is checked and taken out, and `end` refuses what is left."""

    def __init__(self, name: str, entries: Any) -> None:
        if not isinstance(entries, dict):
            raise ConfigError(f"{name} must be a table, not {entries!r}")
        self.name, self.entries = name, {**entries}

    def take(self, key: str, default: Any = None) -> Any:
        value = self.entries.pop(key, default)
        if value is None:
            raise ConfigError(f"{self.name} lacks {key!r}")
        return value

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str):
            raise ConfigError(f"{key} of {self.name} must be text in quotes, not {value}")
        return value

    def number(
        self, key: str, default: float | None = None, *, zero: bool = False, most: float = 1e300
    ) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float) or not (0 < value <= most or (zero and value == 0)):
            bounds = ("at least" if zero else "above") + " 0" + (" and at most 1" if most == 1 else "")
            raise ConfigError(f"{key} of {self.name} must be a number {bounds}, not {value!r}")
        return float(value)

    def curve(self, key: str) -> Curve:
        value = self.take(key)
        try:
            return Curve.read(value)
        except ConfigError as error:
            raise ConfigError(f"{key} of {self.name}: {error}") from error

    def end(self) -> None:
        self.entries.pop("source", None)
        if self.entries:
            raise ConfigError(f"{self.name} has {', '.join(self.entries)}, which the planner does not know")


def _efficiency(table: _Table) -> Efficiency:
    efficiency = Efficiency(
        weight_mbu=table.curve("weight_mbu"),
        gemm_mfu=table.curve("gemm_mfu"),
        attention_mbu=table.curve("attention_mbu"),
        attention_mfu=table.curve("attention_mfu"),
        step_overhead=table.number("step_overhead_us", 0.0, zero=True) * 1e-6,
        layer_overhead=table.number("layer_overhead_us", 0.0, zero=True) * 1e-6,
        sequence_overhead=table.number("sequence_overhead_us", 0.0, zero=True) * 1e-6,
        source=table.text("source"),
    )
    table.end()
    return efficiency


def _device(key: str, entries: Any, kinds: Mapping[str, Efficiency]) -> Device:
    table = _Table(f"device {key!r}", entries)
    kind = table.text("kind")
    measured, prices = table.take("efficiency", {}), table.take("price", [])
    if not isinstance(prices, list):
        raise ConfigError(f"price of {table.name} must be a list of tables, not {prices!r}")
    device = Device(
        key=key,
        name=table.text("name"),
        kind=kind,
        flops=table.number("tflops") * 1e12,
        memory_bytes=table.number("memory_gb") * 1e9,
        memory_bandwidth=table.number("memory_tbps") * 1e12,
        network_bandwidth=table.number("network_gbps", zero=True) * 1e9 / 8,
        link_bandwidth=table.number("link_gbs", zero=True) * 1e9,
        efficiency=_efficiency(_Table(f"efficiency of {table.name}", measured))
        if measured
        else look_up("kind of device", kind, kinds),
        prices=tuple(_price(_Table(f"price of {table.name}", price)) for price in prices),
        source=table.text("source"),
    )
    table.end()
    return device


def _price(table: _Table) -> Price:
    price = Price(table.number("usd"), table.text("source"), table.text("date"))
    table.end()
    return price


def _transport(key: str, entries: Any) -> Transport:
    table = _Table(f"transport {key!r}", entries)
    transport = Transport(
        key=key,
        name=table.text("name"),
        round_trip=table.number("round_trip_us", zero=True) * 1e-6,
        utilisation=table.number("utilisation", most=1),
        source=table.text("source"),
    )
    table.end()
    return transport


@cache
def package_data(file_name: str) -> dict[str, Any]:
    """Read a TOML file that ships with the planner."""
    return tomllib.loads(files("vllm_lamina.planner").joinpath(file_name).read_text(encoding="utf-8"))


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
