"""Child processes import the package that their parent did: ``python -P .../vllm_lamina/run_module.py MODULE ...``.

There may be two: one that is installed, and sources in the working directory, where the parent looked first or did not.
"""

import importlib.util
import runpy
import sys
from pathlib import Path


def command(module: str) -> list[str]:
    """Begin the command line that runs a module of this package, with nothing of the working directory."""
    return [sys.executable, "-P", __file__, module]


def _import_this_package() -> None:
    """Import the package that this file lies in, wherever Python would look."""
    init = Path(__file__).with_name("__init__.py")
    spec = importlib.util.spec_from_file_location("vllm_lamina", init)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["vllm_lamina"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    _import_this_package()
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
