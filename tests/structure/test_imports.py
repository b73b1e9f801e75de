"""Imports go down the list of docs/architecture.md, only compat touches vLLM's internals, and neither worker knows the
other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "vllm_lamina"

EXTENSION_POINTS = {
    "vllm": "LLM and SamplingParams, the Python interface",
    "vllm.config": "VllmConfig, which every class below is built from",
    "vllm.envs": "environment variables",
    "vllm.logger": "init_logger",
    "vllm.v1.attention.backend": "base classes of attention backends",
    "vllm.v1.executor.abstract": "base class of executors (--distributed-executor-backend)",
    "vllm.v1.executor.multiproc_executor": "vLLM's own executors",
    "vllm.v1.executor.uniproc_executor": "vLLM's own executors",
    "vllm.v1.kv_cache_interface": "what an attention backend is asked and told",
    "vllm.v1.metrics.loggers": "base class of stat loggers",
    "vllm.v1.worker.cpu_worker": "vLLM's own workers (worker_cls)",
    "vllm.v1.worker.gpu_worker": "vLLM's own workers (worker_cls)",
}
"""Modules of vLLM that others than compat may import, and what for: what vLLM offers to plugins."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Modules that a module imports, wherever it does; of ours the modules themselves."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where they go"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found.update(name if name in modules() else str(node.module) for name in names)
    return frozenset(found)


def ours(module: str) -> Iterator[str]:
    return (name for name in imports(module) if name in modules() and name != PACKAGE)


def layers() -> list[str]:
    """The list of docs/architecture.md, from the top."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    [block] = re.findall(r"Imports go down this list.*?```\n(.*?)```", text, re.DOTALL)
    return [line.split()[0] for line in block.splitlines()]


def layer_of(module: str, order: list[str]) -> int:
    name = module.removeprefix(f"{PACKAGE}.")
    candidates = [i for i, layer in enumerate(order) if f"{name}.".startswith(f"{layer}.")]
    assert candidates, f"{module} is not in the list of docs/architecture.md"
    return max(candidates, key=lambda i: len(order[i]))


def test_imports_go_down() -> None:
    order = layers()
    for module in modules():
        if module in (PACKAGE, f"{PACKAGE}.worker"):
            continue
        for imported in ours(module):
            mine, its = layer_of(module, order), layer_of(imported, order)
            assert mine <= its, f"{module} imports {imported}: {order[its]} is above {order[mine]}"


def test_every_layer_exists() -> None:
    names = {name.removeprefix(f"{PACKAGE}.") for name in modules()} | {"_native"}
    assert set(layers()) <= names


def test_there_is_no_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for imported in ours(module):
                # A package's own module is not a cycle: `import package.module` runs the package first in any case.
                if not f"{module}.".startswith(f"{imported}."):
                    visit(imported, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def reached_from(start: str) -> set[str]:
    reached, waiting = set(), [name for name in modules() if f"{name}.".startswith(f"{start}.")]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += ours(module)
            waiting.append(module.rpartition(".")[0]) if "." in module else None
    return reached


@pytest.mark.parametrize("heavy", ["vllm", "torch", "ray", "numpy"])
def test_the_attention_worker_is_light(heavy: str) -> None:
    for module in reached_from(f"{PACKAGE}.worker.attention_worker"):
        found = {name for name in imports(module) if name.split(".")[0] == heavy}
        assert not found, f"{module}, which the attention worker imports, imports {found}"


def test_of_the_two_workers_neither_knows_the_other() -> None:
    model, attention = f"{PACKAGE}.worker.model_worker", f"{PACKAGE}.worker.attention_worker"
    for one, other in ((model, attention), (attention, model)):
        assert not {name for name in reached_from(one) if name.startswith(other)}


def test_only_compat_touches_internals_of_vllm() -> None:
    for module in modules():
        if not module.startswith(f"{PACKAGE}.compat."):
            found = {name for name in imports(module) if name.split(".")[0] == "vllm"}
            assert found <= EXTENSION_POINTS.keys(), f"{module} imports {found - EXTENSION_POINTS.keys()}"


def test_children_are_started_by_run_module() -> None:
    """Or they may import another package than their parent did."""
    starting = {module for module, path in modules().items() if "[sys.executable" in path.read_text()}
    assert starting == {f"{PACKAGE}.run_module"}


def test_only_the_kernels_of_a_gpu_need_triton() -> None:
    found = {
        module for module in modules() if any(name.split(".")[0] == "triton" for name in imports(module))
    }
    assert found == {f"{PACKAGE}.device.exchange_kernels"}


NATIVE_ORDER = ["worker/attention_worker", "worker/model_worker", "wire", "transport", "kernel", "base"]
"""Folders of csrc, from the top; the two workers stand beside each other."""


def test_native_includes_go_down() -> None:
    folders = {path.relative_to(ROOT / "csrc").parent.as_posix() for path in (ROOT / "csrc").rglob("*.h")}
    assert {folder.removesuffix("/isa") for folder in folders} == set(NATIVE_ORDER)
    for path in [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]:
        mine = path.relative_to(ROOT / "csrc").parent.as_posix().removesuffix("/isa")
        if mine == ".":  # module.cpp
            continue
        for included in re.findall(r'#include "(.*?)/[\w.]+"', path.read_text()):
            its = included.removesuffix("/isa")
            if its != mine:
                assert NATIVE_ORDER.index(its) > max(1, NATIVE_ORDER.index(mine)), (
                    f"{path} includes {included}"
                )
