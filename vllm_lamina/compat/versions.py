"""The vLLM versions that Lamina was tested with."""

from __future__ import annotations

import re

from vllm_lamina.errors import LaminaError

TESTED = "0.32"
"""Release series of vLLM (major.minor) whose internals tests/compat checks."""


def check_vllm_version(version: str | None = None) -> None:
    """Refuse a vLLM whose internals were not tested.

    Parameters
    ----------
    version
        Version of vLLM; the installed one by default.

    Raises
    ------
    LaminaError
        The version is outside the tested series.
    """
    if version is None:
        import vllm

        version = vllm.__version__
    series = re.match(r"\d+\.\d+", version)
    if series is None or series.group() != TESTED:
        raise LaminaError(
            f"Lamina is tested with vLLM {TESTED}.x; this is vLLM {version}. Install vllm>={TESTED},<"
            f"{_next_series()} or start without --executor lamina."
        )


def _next_series() -> str:
    major, minor = TESTED.split(".")
    return f"{major}.{int(minor) + 1}"
