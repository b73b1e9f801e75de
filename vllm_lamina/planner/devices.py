"""Describes devices, networks and prices as data, each with its source and date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.catalogue import look_up, package_data, read_toml
from vllm_lamina.planner.efficiency import IDEAL, Efficiency

PRICE_SETS = ("latest", "paper")


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

    def ideal(self) -> Device:
        """Return this device with every operator at the roofline."""
        return replace(self, efficiency=IDEAL)


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
    collective: Collective = field(default=Collective(10e-6, 0.77))

    def device(self, name: str) -> Device:
        """Find a device by name; a `ConfigError` gives the nearest names."""
        return look_up("device", name, self.devices)

    def transport(self, name: str) -> Transport:
        """Find a transport by name; a `ConfigError` gives the nearest names."""
        return look_up("transport", name, self.transports)

    def with_price(self, name: str, usd: float) -> Catalogue:
        """Return the catalogue with the user's own price for one device, which precedes all others."""
        device = self.device(name)
        if usd <= 0:
            raise ConfigError(f"the price of {name} must be above 0, not {usd}")
        priced = replace(device, prices=(Price(usd, "paper or latest: given by the user", "9999"),))
        return replace(self, devices={**self.devices, device.key: priced})


def read_catalogue(extra: Path | None = None) -> Catalogue:
    """Read the planner's catalogue and, over it, the tables of the user's file.

    A table of the user's file replaces the keys it gives; ``[device.NAME.efficiency]`` holds measured values, as
    `vllm-lamina plan calibrate` writes them.

    Raises
    ------
    ConfigError
        The file cannot be read, or a description lacks a key.
    """
    return _build(package_data("devices.toml") if extra is None else _merged(extra))


def _merged(extra: Path) -> dict[str, Any]:
    base, user = package_data("devices.toml"), read_toml(extra)
    merged = {**base}
    for section in ("device", "transport", "efficiency"):
        merged[section] = {**base[section]}
        for key, table in user.get(section, {}).items():
            merged[section][key] = {**base[section].get(key, {}), **table}
    merged["collective"] = {**base["collective"], **user.get("collective", {})}
    return merged


def _build(tables: Mapping[str, Any]) -> Catalogue:
    kinds = {kind: Efficiency.read(table) for kind, table in tables["efficiency"].items()}
    return Catalogue(
        devices={key: _device(key, table, kinds) for key, table in tables["device"].items()},
        transports={
            key: Transport(
                key=key,
                name=table["name"],
                round_trip=table["round_trip_us"] * 1e-6,
                utilisation=table["utilisation"],
                source=table["source"],
            )
            for key, table in tables["transport"].items()
        },
        collective=Collective(
            tables["collective"]["latency_us"] * 1e-6, tables["collective"]["link_utilisation"]
        ),
    )


def _device(key: str, table: Mapping[str, Any], kinds: Mapping[str, Efficiency]) -> Device:
    try:
        return Device(
            key=key,
            name=table["name"],
            kind=table["kind"],
            flops=table["tflops"] * 1e12,
            memory_bytes=table["memory_gb"] * 1e9,
            memory_bandwidth=table["memory_tbps"] * 1e12,
            network_bandwidth=table["network_gbps"] * 1e9 / 8,
            link_bandwidth=table["link_gbs"] * 1e9,
            efficiency=Efficiency.read(table["efficiency"])
            if "efficiency" in table
            else look_up("kind of device", table["kind"], kinds),
            prices=tuple(Price(p["usd"], p["source"], p["date"]) for p in table.get("price", ())),
            source=table["source"],
        )
    except KeyError as error:
        raise ConfigError(f"the description of device {key!r} lacks {error}") from error


@cache
def default_catalogue() -> Catalogue:
    """The catalogue that ships with the planner."""
    return read_catalogue()
