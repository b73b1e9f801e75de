"""Lamina's metrics on vLLM's ``/metrics``: what the engine counts, what the attention workers say, and both shown."""
