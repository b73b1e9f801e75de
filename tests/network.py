"""Hosts that network namespaces stand for, on one Ethernet switch with this process; their links are rate limited."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from cores import ATTENTION_CPU
from worker_processes import Worker, worker_process

INTERFACE = "eth0"
PORT = 7100
MTU = 1500

# By process: tests that run side by side share this host's routes.
_SUBNET = f"10.250.{os.getpid() % 250}"
HERE = f"{_SUBNET}.254"
"""This process's address."""

_networks = itertools.count()


@dataclass(frozen=True)
class LonelyHost:
    """A namespace; `prefix` before a command runs it there."""

    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def processes(self) -> dict[int, str]:
        """Process id and command line of what runs there."""
        found = {}
        for pid in map(int, _run("ip", "netns", "pids", self.namespace).split()):
            with contextlib.suppress(OSError):
                command = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                found[pid] = command.strip()
        return found


@dataclass(frozen=True)
class Host(LonelyHost):
    """One with an interface to a switch."""

    switch: str
    """The namespace at the other end of the cable."""
    port: str
    """The interface there."""
    limit: tuple[str, ...]
    """The queueing discipline of both ends, as `tc` takes it."""

    def ip(self, *arguments: str) -> None:
        """Run `ip` there, such as "address", "add"."""
        _ip("-n", self.namespace, *arguments)

    def cut_link(self) -> None:
        """Pull the cable: nobody is told."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def lose_outgoing(self) -> None:
        """Lose what this host sends, and let it hear: nobody is told."""
        _set_queue(self.namespace, INTERFACE, *_LOSE_EVERYTHING)

    def lose_incoming(self) -> None:
        """Lose what is sent to this host, and let it speak: nobody is told."""
        _set_queue(self.switch, self.port, *_LOSE_EVERYTHING)

    def heal_link(self) -> None:
        """Undo whatever was done to the link."""
        for namespace, device in ((self.namespace, INTERFACE), (self.switch, self.port)):
            _set_queue(namespace, device, *self.limit)
        _ip("-n", self.namespace, "link", "set", INTERFACE, "up")
        _ip("-n", self.namespace, "route", "replace", "default", "via", HERE)  # it went with the link

    def count(self, counter: str) -> int:
        """A counter of the interface, such as "tx_bytes": whole Ethernet frames without preamble and checksum."""
        file = f"/sys/class/net/{INTERFACE}/statistics/{counter}"
        return int(_run(*self.prefix, "cat", file))

    def send_frames_one_by_one(self) -> None:
        """Let no counter see segments of TCP before they are cut to the MTU, as a network card would cut them."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "gso_max_segs", "1")


@contextmanager
def hosts(count: int, rate: str = "1gbit", mtu: int = MTU) -> Iterator[list[Host]]:
    """That many hosts; this process reaches them too. Skips where namespaces may not be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("making network namespaces needs root and the tools ip and tc")
    switch, near = _switch()
    # New names each time: the system takes the old ones down in its own time.
    number = f"{os.getpid()}-{next(_networks)}"
    with ExitStack() as stack:
        for inside, link in ((("-n", switch), "switch"), (("-n", switch), "near"), ((), near)):
            _ip(*inside, "link", "set", link, "mtu", str(mtu))
        _ip("neighbour", "flush", "dev", near)  # the last test's hosts had the same addresses
        found = []
        for index in range(count):
            port, limit = f"port{index}", ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
            host = Host(
                f"lamina-host{index}-{number}",
                f"{_SUBNET}.{index + 1}",
                switch=switch,
                port=port,
                limit=limit,
            )
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "delete", host.namespace)
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", INTERFACE, "netns", host.namespace)
            # At once, not when the system takes the namespace down: the next test's port has the same name.
            stack.callback(_ip, "-n", switch, "link", "delete", port)
            _plug(switch, port, mtu)
            inside = ("-n", host.namespace)
            _ip(*inside, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip(*inside, "link", "set", INTERFACE, "mtu", str(mtu), "up")
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "route", "add", "default", "via", HERE)
            for namespace, device in ((host.namespace, INTERFACE), (switch, port)):
                _set_queue(namespace, device, *limit)
            found.append(host)
        yield found


@cache
def _switch() -> tuple[str, str]:
    """The switch's namespace, and this process's interface on it: there until this process ends.

    UCX reads the routes of its process once, and does not find an interface that comes later.
    """
    switch, near = f"lamina-switch-{os.getpid()}", f"lh{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", switch], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no network namespace may be made here: {made.stderr.strip()}")
    atexit.register(_remove_switch, os.getpid(), switch, near)
    _ip("-n", switch, "link", "add", "switch", "type", "bridge")
    _ip("-n", switch, "link", "set", "switch", "up")
    _ip("link", "add", near, "type", "veth", "peer", "name", "near", "netns", switch)
    _plug(switch, "near", MTU)
    _ip("address", "add", f"{HERE}/24", "dev", near)
    _ip("link", "set", near, "up")
    return switch, near


def _remove_switch(owner: int, switch: str, near: str) -> None:
    if os.getpid() == owner:  # not in a fork
        for command in (("link", "delete", near), ("netns", "delete", switch)):
            subprocess.run(["ip", *command], capture_output=True, check=False)


@contextmanager
def lonely_host() -> Iterator[LonelyHost]:
    """A host without a network: its only address is that of its loopback. Skips where namespaces may not be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and the tool ip")
    name = f"lamina-lonely-{os.getpid()}-{next(_networks)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no network namespace may be made here: {made.stderr.strip()}")
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield LonelyHost(name, "127.0.0.1")
    finally:
        _ip("netns", "delete", name)


@contextmanager
def workers_on(
    worker_hosts: list[Host], secret: Path, directory: Path, *arguments: str
) -> Iterator[list[Worker]]:
    """A worker on each host, as a user starts it."""
    options = ("--memory", "256MiB", "--cpus", ATTENTION_CPU, "--secret-file", str(secret), *arguments)
    directory.mkdir(exist_ok=True)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                worker_process(
                    directory / f"worker{index}.log",
                    f"{host.address}:{PORT}",
                    *options,
                    prefix=host.prefix,
                )
            )
            for index, host in enumerate(worker_hosts)
        ]


def addresses(workers: list[Worker]) -> str:
    """As `--lamina-workers` takes them."""
    return ",".join(worker.address for worker in workers)


def listening_ports(pid: int) -> set[int]:
    """TCP ports on which a process listens, in its network namespace."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            inodes.add(descriptor.readlink().name)
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *others = line.split()
            if state == _LISTEN and f"socket:[{others[5]}]" in inodes:
                found.add(int(local.rpartition(":")[2], 16))
    return found


_LISTEN = "0A"
_LOSE_EVERYTHING = ("pfifo", "limit", "0")


def _set_queue(namespace: str, device: str, *discipline: str) -> None:
    """Give an interface's sending side a queueing discipline."""
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *discipline)


def _plug(switch: str, port: str, mtu: int) -> None:
    _ip("-n", switch, "link", "set", port, "master", "switch", "mtu", str(mtu), "up")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60.0)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
