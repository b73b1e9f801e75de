"""UCX, the library under the data channel between hosts: which one is used, over which devices, in words."""

import importlib.util
import ipaddress
import os
import platform
from collections import Counter
from operator import itemgetter
from pathlib import Path

from vllm_lamina import _native
from vllm_lamina._native import ChannelError, UcxChannel, UcxInfo
from vllm_lamina.transport.errors import UcxUnavailable
from vllm_lamina.wire.messages import MAX_HOSTS, Network

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

TOKEN_BYTES = 16
"""Length of the random token that both ends of a `UcxChannel` share."""

LIBRARY_VARIABLE = "LAMINA_UCX_LIBRARY"
"""Environment variable that names the libucp.so.0 to load."""

DEVICES_VARIABLE = "UCX_NET_DEVICES"
"""Environment variable by which UCX is told its devices, whatever is asked of it here."""

SYSTEM_LIBRARY = "libucp.so.0"


def load_ucx(path: str | None = None) -> UcxInfo:
    """Load UCX 1.13 or later: the system's, or else that of the ``libucx`` wheel.

    The system's comes first because it can have RDMA, which the wheel has not. A process loads one UCX; later
    calls return it.

    Parameters
    ----------
    path
        The libucp.so.0 to load, nothing else; by default what ``LAMINA_UCX_LIBRARY`` says.

    Raises
    ------
    UcxUnavailable
        There is no usable UCX; the text says what was tried and what to install.
    """
    path = path or os.environ.get(LIBRARY_VARIABLE)
    candidates = [path] if path else [SYSTEM_LIBRARY, *filter(None, [wheel_library()])]
    failures = []
    for candidate in candidates:
        try:
            return _native.load_ucx(candidate)
        except ChannelError as error:
            failures.append(str(error))
    raise UcxUnavailable(
        f"UCX cannot be used ({'; '.join(failures)}): install it (Debian and Ubuntu: apt install libucx0; or "
        f"pip install 'vllm-lamina[ucx]', without RDMA), or let {LIBRARY_VARIABLE} name a libucp.so.0"
    )


def wheel_library() -> str | None:
    """Return the path of libucp in the ``libucx`` wheel (``libucx-cu12`` and its like), if installed."""
    spec = importlib.util.find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        library = Path(folder, "lib", SYSTEM_LIBRARY)
        if library.exists():
            return str(library)
    return None


def network_of(host: str) -> Network:
    """Return what a channel uses of this host: the network interface that has an address, and its RDMA ports.

    So a channel uses the network of a control connection. It need not use its address: over TCP, UCX takes the first
    that the interface has of a family. Where ``UCX_NET_DEVICES`` chooses other devices, it is these.

    Parameters
    ----------
    host
        A numeric address, such as the local end of the control connection.

    Raises
    ------
    UcxUnavailable
        No interface that is up has the address.
    ValueError
        It is not an address.
    """
    control = ipaddress.ip_address(host)
    found = [(name, ipaddress.ip_address(address)) for name, address in _native.interface_addresses()]
    if devices := os.environ.get(DEVICES_VARIABLE, ""):
        interfaces, all_interfaces = set(devices.split(",")), {name for name, _ in found}
        # There may be RDMA devices among them, or "all", "^eth0", "eth[0-3]".
        if not interfaces <= all_interfaces:
            interfaces = all_interfaces
    else:
        interface = _interface_with(control, found)
        interfaces = {interface}
        # A network function's InfiniBand devices, each with its ports.
        ports = Path("/sys/class/net", interface, "device/infiniband").glob("*/ports/*")
        devices = ",".join([interface, *sorted(f"{port.parent.parent.name}:{port.name}" for port in ports)])
    counts: Counter[tuple[str, int]] = Counter()
    ranked = []
    for name, address in found:
        family = address.version
        # UCX cannot use link-local IPv6 addresses: they mean nothing without an interface.
        if name in interfaces and not (family == 6 and address.is_link_local):
            ranked.append((counts[name, family], family != control.version, str(address)))
            counts[name, family] += 1
    hosts = [address for *_, address in sorted(ranked, key=itemgetter(0, 1))]
    return Network(devices, tuple(dict.fromkeys([*hosts[: MAX_HOSTS - 1], str(control)])))


def _interface_with(host: IPAddress, found: list[tuple[str, IPAddress]]) -> str:
    for name, address in found:
        if address == host:
            return name
    if host.is_loopback:
        return "lo"
    raise UcxUnavailable(
        f"no network interface that is up has the address {host} on the host {platform.node()}: name another address "
        f"of that host, or, if NAT makes this one, let {DEVICES_VARIABLE} name the devices there"
    )


def new_channel(token: bytes, ring_bytes: int, spin_us: int, here: Network, there: Network) -> UcxChannel:
    """Return one end of a channel, which admits the other; see `UcxChannel`. Raises ChannelError."""
    prefer_ipv6 = ":" in here.hosts[0]
    channel = UcxChannel(token, ring_bytes, spin_us, here.devices, prefer_ipv6)
    channel.admit(list(there.hosts))
    return channel


def what_to_check(here: Network, there: Network) -> str:
    """Say what a channel that cannot be opened was to connect, and what may stand in its way."""
    return (
        f"UCX was to connect {here.devices} here ({', '.join(here.hosts)}) with {there.devices} there "
        f"({', '.join(there.hosts)}), by the first address of each. Can these reach each other, does a firewall close "
        "the ports that UCX chooses (UCX_TCP_PORT_RANGE), does NAT change addresses? "
        f"{DEVICES_VARIABLE}, on either side, names other devices"
    )


def describe_ucx(info: UcxInfo, channel: UcxChannel | None = None) -> str:
    """Say in a line which UCX this is, what the channel runs over, and whether RDMA is there.

    Examples
    --------
    >>> describe_ucx(load_ucx(), channel)
    'UCX 1.13.1 (/usr/lib/x86_64-linux-gnu/libucp.so.0.0.0), channel over tcp/eth0, RDMA not available'
    """
    over = f", channel over {', '.join(channel.transports)}" if channel and channel.transports else ""
    if not info.has_rdma:
        rdma = "RDMA not available"
    elif channel is None or channel.has_rdma:
        rdma = "RDMA available" if channel is None else "RDMA in use"
    else:
        rdma = "RDMA available and not in use"
    return f"UCX {info.version} ({info.path}){over}, {rdma}"
