"""Fixture for tests with the real model, which takes seconds to make the first time and is kept in the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory; the GGUF file that it was made of lies beside it."""
    program = [sys.executable, str(ROOT / "scripts" / "get_model.py")]
    output = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout
    return Path(output.strip())
