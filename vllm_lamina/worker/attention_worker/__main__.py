"""``python -m vllm_lamina.worker.attention_worker``: an attention worker, as engines start it."""

import sys

from vllm_lamina.worker.attention_worker.process import main

sys.exit(main())
