"""What this machine, and the cgroup around this process, have to offer."""

from collections.abc import Iterable
from pathlib import Path

POOL_RESERVE_BYTES = 256 << 20
"""Left free beside a pool of KV blocks: for the channel's rings, the worker itself and the rest of the machine."""

SYSTEM_CPUS = Path("/sys/devices/system/cpu")


def memory_for_pool() -> int:
    """Return how large a pool this host and the cgroups around this process can hold now, in bytes."""
    return max(0, available_memory() - POOL_RESERVE_BYTES)


def available_memory() -> int:
    """Return the bytes this process may still take: what the system has, or less where a cgroup limits it."""
    available = _meminfo()["MemAvailable"]
    for limit, used in cgroup_memory():
        available = min(available, max(0, limit - used))
    return available


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """Return (limit, use) in bytes of each limited cgroup around this process, of version 1 or 2.

    Cached files, such as a model's that were read, count as free: the kernel drops them before it kills anybody.
    """
    found = []
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names, prefix = root, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            prefix = "total_"  # of the cgroup with those below it, as the usage is
        else:
            continue
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            limit, used = (_read(directory / name).strip() for name in names)
            # No limit is the word "max" in version 2, and a number beyond any memory in version 1.
            if limit.isdigit() and used.isdigit() and int(limit) < 2**60:
                cached = _cached_files(directory / "memory.stat", prefix)
                found.append((int(limit), max(0, int(used) - cached)))
            if directory == top:
                break
    return found


def _cached_files(stat: Path, prefix: str) -> int:
    rows = (line.split() for line in _read(stat).splitlines())
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in names)


def cores_of(cpus: Iterable[int], system: Path = SYSTEM_CPUS) -> list[tuple[int, ...]]:
    """Return the CPUs in their order, those that are hyperthreads of one core together.

    Where the system does not say, as in some containers, each is a core of its own.
    """
    cores: dict[str, list[int]] = {}
    for cpu in cpus:
        topology = system / f"cpu{cpu}" / "topology"
        # The latter is the name before Linux 5.3.
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.setdefault(siblings.strip() or str(cpu), []).append(cpu)
    return [tuple(core) for core in cores.values()]


def transparent_hugepages() -> str:
    """Return the system's setting for transparent huge pages: always, madvise, never, or empty for none."""
    setting = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return setting.partition("[")[2].partition("]")[0]


def memory_total() -> int:
    """Return the machine's memory in bytes."""
    return _meminfo()["MemTotal"]


def _meminfo() -> dict[str, int]:
    """Return /proc/meminfo's sizes in bytes."""
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())
    return {
        words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"
    }


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
