"""What lies in the working directory is not imported, whatever its name; where Python does so, one is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import ModelZoo
from openai import OpenAI
from programs import LAMINA, TINY_ENGINE
from server import VllmServer

import vllm_lamina
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker

PACKAGE = Path(vllm_lamina.__file__).parent


@pytest.fixture
def misleading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand where packages are called like ours and two that it needs, and cannot be imported."""
    standing = tmp_path / "standing"
    for name in ("vllm_lamina", "zmq", "numpy"):
        package = standing / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise ImportError('{name} of the working directory')\n")
    monkeypatch.chdir(standing)


@pytest.mark.slow
@pytest.mark.usefixtures("misleading")
def test_server(model_zoo: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Empty: vLLM keeps there what it learns of a model from a process of its own.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    flags = (*TINY_ENGINE, "--enforce-eager", "--served-model-name", "tiny", *LAMINA)
    with VllmServer(model_zoo("llama"), *flags, directory=tmp_path) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60, max_retries=0)
        answer = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=4, extra_body={"ignore_eos": True}
        )
    assert answer.usage.completion_tokens == 4


@pytest.mark.usefixtures("misleading")
def test_embedded_attention_worker() -> None:
    EmbeddedAttentionWorker.start(32 << 20, [0]).stop()


def copied(directory: Path, *modules: str) -> Path:
    """A package like ours with some of its modules alone."""
    package = directory / "vllm_lamina"
    package.mkdir(parents=True)
    for module in ("__init__.py", *modules):
        shutil.copy(PACKAGE / module, package)
    return package


@pytest.mark.usefixtures("misleading")
def test_children_import_the_package_of_their_parent(tmp_path: Path) -> None:
    package = copied(tmp_path / "elsewhere", "run_module.py")
    (package / "child.py").write_text("import sys, vllm_lamina; print(vllm_lamina.__file__, sys.argv[1:])\n")
    command = [sys.executable, "-P", str(package / "run_module.py"), "vllm_lamina.child", "--an", "option"]
    output = subprocess.check_output(command, text=True, timeout=60)
    assert output == f"{package / '__init__.py'} ['--an', 'option']\n"


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_source_tree_that_is_not_built_says_so(is_installed: bool, tmp_path: Path) -> None:
    package, installed = copied(tmp_path / "tree", "_native.py"), tmp_path / "site" / "vllm_lamina"
    if is_installed:
        installed.mkdir(parents=True)
        (installed / "_native.abi3.so").touch()
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import vllm_lamina._native"],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": str(installed.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    hidden = f"hides the package that is installed, {installed}: keep {package.parent} out of Python's path"
    assert f"ImportError: {package} has no native module" in result.stderr
    assert f"pip install --editable {package.parent}" in result.stderr
    assert (hidden in result.stderr) == is_installed
