"""What this machine, and the cgroup around this process, have to offer."""

from pathlib import Path


def available_memory() -> int:
    """Return the bytes this process may still take: what the system has, or less where a cgroup limits it."""
    available = _meminfo()["MemAvailable"]
    for limit, used in cgroup_memory():
        available = min(available, max(0, limit - used))
    return available


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """Return (limit, use) in bytes of each limited cgroup around this process, of version 1 or 2."""
    found = []
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            limit, used = (_read(directory / name).strip() for name in names)
            # No limit is the word "max" in version 2, and a number beyond any memory in version 1.
            if limit.isdigit() and used.isdigit() and int(limit) < 2**60:
                found.append((int(limit), int(used)))
            if directory == top:
                break
    return found


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
