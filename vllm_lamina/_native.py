"""Says why the native module is missing: beside it, the compiled ``_native`` is what Python imports."""

import sys
from pathlib import Path

_package = Path(__file__).resolve().parent
_others = (Path(entry).resolve() / _package.name for entry in sys.path)
_hidden = next((other for other in _others if other != _package and any(other.glob("_native.*.so"))), None)
_build = f"build this one: pip install --editable {_package.parent}"
if _hidden is None:
    raise ImportError(f"{_package} has no native module; {_build}")
raise ImportError(
    f"{_package} has no native module, and hides the package that is installed, {_hidden}: keep {_package.parent} out "
    f"of Python's path (run from another directory, or with PYTHONSAFEPATH=1), or {_build}"
)
