"""Options of an attention worker's process."""

import argparse
import os
from dataclasses import dataclass

from vllm_lamina.host import memory_for_pool
from vllm_lamina.transport.address import DEFAULT_ADDRESS, ControlAddress
from vllm_lamina.transport.errors import SecretError
from vllm_lamina.transport.secret import MAKE_ONE, ControlKeys
from vllm_lamina.units import format_bytes, parse_bytes, parse_cpus

DEFAULT_POOL_SHARE = 0.8
"""Share of the available memory that a worker offers unless told otherwise."""

DEFAULT_LEASE_SECONDS = 10.0
MIN_LEASE_SECONDS = 1.0
DEFAULT_DRAIN_SECONDS = 30.0


@dataclass(frozen=True)
class WorkerOptions:
    """Options of an attention worker.

    Attributes
    ----------
    address
        Of the control socket.
    pool_bytes
        Memory for KV blocks.
    cpus
        One thread is pinned to each; empty for unpinned threads.
    threads
        Unpinned threads; 0 for one per CPU of this process.
    keys
        Derived from the secret; None for an address that only this host can reach.
    lease_seconds
        How long the KV blocks of an engine outlive its last heartbeat; 0 where the system tells of its end, as it does
        of an embedded worker's parent, which is its engine.
    drain_seconds
        How long a worker that is asked to end waits for its engine to leave.
    parent_pid
        The process without which a worker ends, embedded or started by Ray; None if it is on its own.
    log_prefix
        Put before each line of the log.
    """

    address: ControlAddress
    pool_bytes: int
    cpus: list[int]
    keys: ControlKeys | None = None
    lease_seconds: float = 0.0
    drain_seconds: float = 0.0
    parent_pid: int | None = None
    log_prefix: str = ""
    threads: int = 0

    @property
    def num_threads(self) -> int:
        """Threads of the kernel, the serving thread included."""
        return len(self.cpus) or self.threads or len(os.sched_getaffinity(0))

    @classmethod
    def parse(cls, arguments: argparse.Namespace) -> "WorkerOptions":
        """Check the options of `add_arguments`.

        Raises
        ------
        ValueError
            One of them is malformed, or asks for more than this machine has; the text says which.
        """
        address = ControlAddress.parse(arguments.listen)
        keys = ControlKeys.from_file(arguments.secret_file) if arguments.secret_file else None
        if address.needs_secret and keys is None:
            raise SecretError(
                f"--listen {arguments.listen} can be reached from other hosts and needs --secret-file; {MAKE_ONE}"
            )
        if arguments.lease_seconds < MIN_LEASE_SECONDS:
            raise ValueError(
                f"--lease-seconds {arguments.lease_seconds:g} is less than {MIN_LEASE_SECONDS:g}"
            )
        if arguments.drain_seconds < 0:
            raise ValueError(f"--drain-seconds {arguments.drain_seconds:g} is less than 0")
        if arguments.threads < 0 or (arguments.threads and arguments.cpus):
            raise ValueError("--threads must be above 0, and --cpus says it already: give one of the two")
        # Its parent is its engine; an engine that comes over TCP may be on another host, where only the lease tells.
        embedded = arguments.parent_pid is not None and address.is_ipc
        available = memory_for_pool()
        pool_bytes = (
            parse_bytes(arguments.memory) if arguments.memory else int(available * DEFAULT_POOL_SHARE)
        )
        if pool_bytes > available:
            raise ValueError(
                f"--memory {arguments.memory} is more than the {format_bytes(available)} that this host, and the "
                "cgroup around this process, can hold now: free some, or give it less"
            )
        return cls(
            address=address,
            pool_bytes=pool_bytes,
            cpus=parse_cpus(arguments.cpus) if arguments.cpus else [],
            keys=keys,
            lease_seconds=0.0 if embedded else arguments.lease_seconds,
            drain_seconds=0.0 if embedded else arguments.drain_seconds,
            parent_pid=arguments.parent_pid,
            log_prefix=arguments.log_prefix,
            threads=arguments.threads,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of an attention worker."""
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=DEFAULT_ADDRESS,
        help="address to listen on; one that other hosts can reach, such as 0.0.0.0:7100, needs --secret-file "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--secret-file",
        metavar="FILE",
        help="only engines with the same file are served, encrypted; make it with `vllm-lamina secret FILE`",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory for KV blocks, for example 200GiB (default: 80%% of the available memory)",
    )
    parser.add_argument(
        "--cpus",
        metavar="LIST",
        help="CPUs to pin one thread each to, for example 0-3,6 (default: one thread per CPU, not pinned)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads that are not pinned, instead of --cpus (default: one per CPU)",
    )
    parser.add_argument(
        "--lease-seconds",
        metavar="S",
        type=float,
        default=DEFAULT_LEASE_SECONDS,
        help="drop the KV blocks of an engine that was not heard of for so long; engines send heartbeats, busy or idle "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--drain-seconds",
        metavar="S",
        type=float,
        default=DEFAULT_DRAIN_SECONDS,
        help="on SIGTERM, take no new engine and wait so long for the connected one to leave; a second SIGTERM ends at "
        "once (default: %(default)g)",
    )
    parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--log-prefix", default="", help=argparse.SUPPRESS)
