"""vllm-lamina: the attention operator and the KV cache of vLLM on memory-optimised machines."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-lamina")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"
