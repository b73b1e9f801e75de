"""``python -m vllm_lamina.cli``, the same as ``vllm-lamina``."""

import sys

from vllm_lamina.cli import main

sys.exit(main())
