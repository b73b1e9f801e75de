"""The exchange between model workers and attention workers: control plane and data channel."""
