"""UCX, the library under the data channel between hosts: which one is used, over which devices, in words."""

import importlib.util
import ipaddress
import os
from pathlib import Path

from vllm_lamina import _native
from vllm_lamina._native import ChannelError, UcxChannel, UcxInfo
from vllm_lamina.transport.errors import UcxUnavailable

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


def network_devices(host: str) -> str:
    """Return the devices, as in ``UCX_NET_DEVICES``, behind an IP address of this host.

    These are the network interface that has the address and its RDMA ports, so that a channel uses the network
    of a control connection.

    Parameters
    ----------
    host
        A numeric address, such as the local end of the control connection.

    Raises
    ------
    UcxUnavailable
        No interface that is up has the address.
    """
    interface = _interface_with(host)
    # A network function's InfiniBand devices, each with its ports.
    ports = Path("/sys/class/net", interface, "device/infiniband").glob("*/ports/*")
    return ",".join([interface, *sorted(f"{port.parent.parent.name}:{port.name}" for port in ports)])


def source_hosts(host: str) -> tuple[str, ...]:
    """Return the numeric IP addresses from which a channel over `network_devices` of the same address may connect.

    These are the interface's, or where ``UCX_NET_DEVICES`` chooses others, all that this host has.

    Raises
    ------
    UcxUnavailable
        No interface that is up has the address.
    """
    chosen = None if DEVICES_VARIABLE in os.environ else _interface_with(host)
    return tuple(
        address for interface, address in _native.interface_addresses() if chosen in (None, interface)
    )


def _interface_with(host: str) -> str:
    wanted = ipaddress.ip_address(host)
    for interface, address in _native.interface_addresses():
        if ipaddress.ip_address(address) == wanted:
            return interface
    if wanted.is_loopback:
        return "lo"
    raise UcxUnavailable(f"no network interface of this host that is up has the address {host}")


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
