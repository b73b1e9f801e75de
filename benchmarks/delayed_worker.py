"""An attention worker as it would be over a slower network: each layer's frame reaches it later. Same host only.

    python benchmarks/delayed_worker.py MICROSECONDS OPTION...

The options are those of `vllm-lamina worker`.
"""

import sys

from lamina_benchmarks import DelayedChannel

from vllm_lamina._native import AttentionWorker, Channel
from vllm_lamina.worker.attention_worker import engine_session, process

LATENCY_US = int(sys.argv.pop(1))


class DelayedWorker(AttentionWorker):
    """Serves a channel that delays."""

    def serve(self, channel: Channel) -> None:
        super().serve(DelayedChannel(channel, LATENCY_US))


engine_session.AttentionWorker = DelayedWorker
sys.exit(process.main())
