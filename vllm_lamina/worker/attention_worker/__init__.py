"""The process on the memory machine: KV blocks and attention for one engine at a time, without vLLM and torch."""
