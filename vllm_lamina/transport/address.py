"""Addresses of attention workers, as options and messages hold them."""

import ipaddress
import re
import socket
from dataclasses import dataclass

from vllm_lamina.transport.errors import UnsupportedAddress

DEFAULT_ADDRESS = "127.0.0.1:7100"


@dataclass(frozen=True)
class ControlAddress:
    """Where a worker's control socket is.

    Attributes
    ----------
    text
        As the user wrote it.
    endpoint
        For ZeroMQ; host names are resolved.
    needs_secret
        Whether others than the users of this host can reach it.
    """

    text: str
    endpoint: str
    needs_secret: bool

    @property
    def host(self) -> str:
        """The numeric address; 127.0.0.1 for an embedded worker."""
        return "127.0.0.1" if self.is_ipc else self.endpoint[6:].rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The TCP port; 0 for an embedded worker."""
        return 0 if self.is_ipc else int(self.endpoint.rpartition(":")[2])

    def local_host(self) -> str:
        """Return this host's numeric address on the way to that one. Raises OSError where there is no way."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((self.host, 9))  # sends nothing
            local: str = probe.getsockname()[0]
            return local

    @property
    def is_ipc(self) -> bool:
        """Whether it is the address of an embedded worker, which only this host can reach."""
        return self.endpoint.startswith("ipc://")

    @classmethod
    def parse(cls, text: str) -> "ControlAddress":
        """Read an address.

        Parameters
        ----------
        text
            ``HOST:PORT`` or ``tcp://HOST:PORT``, where the host is a name, an IPv4 address or an IPv6 address in
            brackets; or ``ipc://@NAME`` (abstract namespace: nothing on disk).

        Raises
        ------
        UnsupportedAddress
            If the address is not one of these, or the name has no address.
        """
        if text.startswith("ipc://"):
            if not re.fullmatch(r"ipc://@[\w.-]{1,100}", text):
                raise UnsupportedAddress(
                    f"{text!r}: a local address is ipc://@NAME, with letters, digits, '.', '-', '_'"
                )
            return cls(text, text, needs_secret=False)
        match = re.fullmatch(r"(?:tcp://)?(?:\[([0-9a-fA-F:.]+)\]|([^\s:/@]+)):(\d{1,5})", text)
        if match is None or not 0 < int(match[3]) < 65536:
            raise UnsupportedAddress(
                f"{text!r} is not an address; write HOST:PORT, for example {DEFAULT_ADDRESS} or [::1]:7100"
            )
        address = _resolve(match[1] or match[2], text)
        host = f"[{address}]" if address.version == 6 else str(address)
        return cls(text, f"tcp://{host}:{match[3]}", needs_secret=not address.is_loopback)


def _resolve(host: str, text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the host's first IPv4 address, or the first IPv6 address where it has no other."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnsupportedAddress(f"{text!r}: the host name has no address ({error}); correct it") from error
    addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
    return min(addresses, key=lambda address: address.version)
