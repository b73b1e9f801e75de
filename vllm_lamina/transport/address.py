"""Addresses of attention workers, as options and messages hold them."""

import ipaddress
import re

from vllm_lamina.transport.errors import UnsupportedAddress

DEFAULT_ADDRESS = "127.0.0.1:7100"


def control_endpoint(address: str) -> str:
    """Return the ZeroMQ endpoint of a worker's control socket.

    Parameters
    ----------
    address
        ``HOST:PORT`` or ``tcp://HOST:PORT`` on loopback, or ``ipc://@NAME`` (abstract namespace: nothing on
        disk).

    Raises
    ------
    UnsupportedAddress
        If the address is not one of these.
    """
    if address.startswith("ipc://"):
        if not re.fullmatch(r"ipc://@[\w.-]{1,100}", address):
            raise UnsupportedAddress(
                f"{address!r}: a local address is ipc://@NAME, with letters, digits, '.', '-', '_'"
            )
        return address
    match = re.fullmatch(r"(?:tcp://)?(?:\[([0-9a-fA-F:]+)\]|([^\s:/]+)):(\d{1,5})", address)
    if match is None or not 0 < int(match[3]) < 65536:
        raise UnsupportedAddress(
            f"{address!r} is not an address; write HOST:PORT, for example {DEFAULT_ADDRESS}"
        )
    host = match[1] or match[2]
    if not _is_loopback(host):
        raise UnsupportedAddress(
            f"{address!r} is not on this host, and remote attention workers are not supported yet; "
            f"use a loopback address, for example {DEFAULT_ADDRESS}"
        )
    return f"tcp://[{host}]:{match[3]}" if match[1] else f"tcp://{host}:{match[3]}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
