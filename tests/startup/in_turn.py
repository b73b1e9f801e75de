"""What the tests with engines in one process share: options, and the type of the fixture `in_turn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

InTurn = Callable[..., list[dict[str, Any]]]
Tokens = list[list[int]]

PROMPTS: Tokens = [[4 + (7 * i + length) % 1000 for i in range(length)] for length in (3, 40, 130)]
MAX_TOKENS = 256
"""What every engine is asked for."""

# As in tests/engines.py: vLLM compiles a function of its sampler even with enforce_eager, which takes seconds.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
LAMINA = {"executor": "lamina", "lamina_memory": "64MiB"}
