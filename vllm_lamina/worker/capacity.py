"""Whether a KV pool is large enough to be of use."""

from __future__ import annotations

from vllm_lamina.errors import ConfigError
from vllm_lamina.units import format_bytes


def check_holds_one_request(pool_bytes: int, block_bytes: int, block_size: int, max_model_len: int) -> None:
    """Refuse a pool in which the longest request does not fit.

    Parameters
    ----------
    pool_bytes
        Size of the attention worker's KV pool.
    block_bytes
        What one KV block takes there, over all layers.
    block_size
        Tokens per KV block.
    max_model_len
        Tokens of the longest request.

    Raises
    ------
    ConfigError
        Says how much is needed.
    """
    num_blocks = pool_bytes // block_bytes
    # One block more than the request's own: vLLM keeps block 0 for itself.
    needed = -(-max_model_len // block_size) + 1
    if num_blocks < needed:
        raise ConfigError(
            f"The attention worker's pool of {format_bytes(pool_bytes)} holds "
            f"{max(num_blocks - 1, 0) * block_size} tokens, but one request of --max-model-len {max_model_len} needs "
            f"{format_bytes(needed * block_bytes)}: raise --lamina-memory (or the worker's --memory) to at least "
            "that, or lower --max-model-len."
        )
