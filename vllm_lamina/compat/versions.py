"""The vLLM versions that Lamina was tested with."""

from __future__ import annotations

import re

from vllm_lamina.errors import LaminaError

SERIES = ("0.32", "0.33")
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
    if series is None or series.group() not in SERIES:
        tested = " and ".join(f"{one}.x" for one in SERIES)
        raise LaminaError(
            f"Lamina is tested with vLLM {tested}; this is vLLM {version}. Install vllm=={SERIES[-1]}.* or start "
            "without --executor lamina."
        )
