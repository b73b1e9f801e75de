"""Options of an attention worker's process."""

import argparse
import os
from dataclasses import dataclass

from vllm_lamina.transport.address import DEFAULT_ADDRESS, control_endpoint
from vllm_lamina.units import format_bytes, parse_bytes, parse_cpus
from vllm_lamina.worker.host import available_memory

DEFAULT_POOL_SHARE = 0.8
"""Share of the available memory that a worker offers unless told otherwise."""


@dataclass(frozen=True)
class WorkerOptions:
    """Options of an attention worker.

    Attributes
    ----------
    address
        Of the control socket; see `control_endpoint`.
    pool_bytes
        Memory for KV blocks.
    cpus
        One thread is pinned to each; empty for one unpinned thread per CPU of this process.
    parent_pid
        The process without which an embedded worker ends; None if it is on its own.
    log_prefix
        Put before each line of the log.
    """

    address: str
    pool_bytes: int
    cpus: list[int]
    parent_pid: int | None = None
    log_prefix: str = ""

    @property
    def num_threads(self) -> int:
        """Threads of the kernel, the serving thread included."""
        return len(self.cpus) or len(os.sched_getaffinity(0))

    @classmethod
    def parse(cls, arguments: argparse.Namespace) -> "WorkerOptions":
        """Check the options of `add_arguments`.

        Raises
        ------
        ValueError
            One of them is malformed, or asks for more than this machine has; the text says which.
        """
        control_endpoint(arguments.listen)  # refuses other addresses
        available = available_memory()
        pool_bytes = (
            parse_bytes(arguments.memory) if arguments.memory else int(available * DEFAULT_POOL_SHARE)
        )
        if pool_bytes > available:
            raise ValueError(
                f"--memory {arguments.memory} is more than the {format_bytes(available)} available here"
            )
        return cls(
            address=arguments.listen,
            pool_bytes=pool_bytes,
            cpus=parse_cpus(arguments.cpus) if arguments.cpus else [],
            parent_pid=arguments.parent_pid,
            log_prefix=arguments.log_prefix,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of an attention worker."""
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default=DEFAULT_ADDRESS,
        help="loopback address to listen on (default: %(default)s)",
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
    parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--log-prefix", default="", help=argparse.SUPPRESS)
