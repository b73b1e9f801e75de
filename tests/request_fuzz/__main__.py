"""`python -m tests.request_fuzz --seeds 32 --runner v2`, from the root of the checkout."""

import importlib
import sys
from pathlib import Path

# As pytest does for its modules: tests are not a package.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

if __name__ == "__main__":
    sys.exit(importlib.import_module("fuzz").main())
