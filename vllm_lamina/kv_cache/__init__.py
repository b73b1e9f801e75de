"""The KV cache of an engine: its geometry, and how the attention workers divide it."""
