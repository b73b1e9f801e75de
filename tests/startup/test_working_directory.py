"""What lies in the working directory is not imported, whatever its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import ModelZoo
from openai import OpenAI
from programs import LAMINA, TINY_ENGINE
from server import VllmServer

from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker


@pytest.fixture
def misleading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand where packages are called like ours and two that it needs, and cannot be imported."""
    standing = tmp_path / "standing"
    for name in ("vllm_lamina", "zmq", "numpy"):
        package = standing / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise ImportError('{name} of the working directory')\n")
    monkeypatch.chdir(standing)


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
