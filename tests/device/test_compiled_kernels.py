"""The kernels of the exchange compile for every GPU, to what compiled_kernels.json says; no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import triton
from compiled_kernels import (
    REPRESENTATIVE,
    TARGETS,
    VARIANTS,
    Compiled,
    compile_all,
    markdown,
    measure,
    table,
)

HOW = "python tests/device/compiled_kernels.py --write, and see what changed"


def check(name: str, targets: tuple[int, ...]) -> list[Any]:
    """The compiled kernels; by another Triton than the table's they need only not spill."""
    kernels = []
    for _, target, kernel in compile_all(iter([name]), targets):
        compiled = measure(kernel)
        assert compiled.spilled_bytes == 0
        if triton.__version__ == table()["triton"]:
            assert compiled == Compiled(*table()["kernels"][name][f"sm_{target}"]), HOW
        kernels.append(kernel)
    return kernels


def test_the_table_holds_every_variant_and_so_do_the_docs() -> None:
    kernels = table()["kernels"]
    assert {name: list(rows) for name, rows in kernels.items()} == {
        name: [f"sm_{target}" for target in TARGETS] for name in VARIANTS
    }, HOW
    assert markdown(kernels) in (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_what_most_models_launch(name: str) -> None:
    [kernel] = check(name, (90,))
    ptx = kernel.asm["ptx"]
    assert ("st.release.sys.global.b32" in ptx) == name.endswith("word")
    assert ("ld.acquire.sys.global.b32" in ptx) == (name == "wait_word")
    if not name.endswith("word"):
        assert measure(kernel).wide_accesses > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_on_every_target(name: str) -> None:
    check(name, TARGETS)
