"""``vllm-lamina worker`` runs an attention worker, ``vllm-lamina worker stats`` looks at one."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from vllm_lamina.transport.address import DEFAULT_ADDRESS
from vllm_lamina.units import format_bytes
from vllm_lamina.worker.attention_worker.options import add_arguments

if TYPE_CHECKING:
    from vllm_lamina.wire.messages import WorkerStats


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("worker", help="run an attention worker, or look at one")
    add_arguments(parser)
    parser.set_defaults(run=run_worker)

    stats = parser.add_subparsers(metavar="[stats]").add_parser(
        "stats", help="show a running worker's counters"
    )
    stats.add_argument(
        "address", metavar="ADDRESS", nargs="?", default=DEFAULT_ADDRESS, help="(default: %(default)s)"
    )
    stats.add_argument("--secret-file", metavar="FILE", default="", help="of an attention worker elsewhere")
    stats.add_argument("--json", action="store_true", help="print the counters as JSON")
    stats.set_defaults(run=show_stats)


def run_worker(arguments: argparse.Namespace) -> int:
    """Run an attention worker."""
    from vllm_lamina.worker.attention_worker.process import serve

    return serve(arguments)


def show_stats(arguments: argparse.Namespace) -> int:
    """Print a worker's counters."""
    import msgspec

    from vllm_lamina.transport.connection import AttentionWorkerConnection
    from vllm_lamina.transport.errors import ConnectionFailed

    try:
        with AttentionWorkerConnection.connect(
            arguments.address, timeout=3.0, secret_file=arguments.secret_file
        ) as worker:
            stats = worker.stats()
    except ConnectionFailed as error:
        print(f"vllm-lamina worker stats: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(stats)))
    else:
        print(format_stats(stats))
    return 0


def format_stats(stats: "WorkerStats") -> str:
    """Lay a worker's counters out as a table of names and values."""
    if not stats.connected:
        pool, refused = format_bytes(stats.pool_bytes), stats.refused_clients
        return f"pool       {pool}\nengine     none\nrefused    {refused} clients"
    busy = stats.ns_attending + stats.ns_appending
    total = max(1, busy + stats.ns_waiting + stats.ns_idle)

    def time_row(nanoseconds: int) -> str:
        return f"{nanoseconds / 1e9:.3f} s ({100 * nanoseconds / total:.0f}%)"

    used, pool = format_bytes(stats.used_bytes), format_bytes(stats.pool_bytes)
    rows = {
        "pool": f"{used} in {stats.num_blocks} KV blocks, of {pool}",
        "engine": "connected",
        "kernel": stats.isa,
        "steps": f"{stats.steps}",
        "messages": f"{stats.messages}, {stats.rejected_frames} rejected",
        "received": format_bytes(stats.bytes_in),
        "sent": format_bytes(stats.bytes_out),
        "appended": f"{stats.tokens_appended} tokens, over all layers",
        "attending": time_row(stats.ns_attending),
        "appending": time_row(stats.ns_appending),
        "waiting": f"{time_row(stats.ns_waiting)} within steps",
        "idle": time_row(stats.ns_idle),
        "refused": f"{stats.refused_clients} clients",
    }
    return "\n".join(f"{name:<11}{value}" for name, value in rows.items())
