"""Native part of vllm-lamina: attention kernel, channels, attention worker."""

from typing import Any

class ChannelError(RuntimeError):
    """Base of the channel's errors."""

class ChannelTimeout(ChannelError):
    """The deadline passed."""

class ChannelClosed(ChannelError):
    """The peer is gone."""

class AttentionWorkerError(RuntimeError):
    """The attention worker rejected a frame of this lane; the text is its reason."""

class AttentionClient:
    """The model worker's side of the data channel. Pointers are addresses (`tensor.data_ptr()`), strides bytes."""

    generation: int
    def begin_step(
        self,
        lane: int,
        num_decodes: int,
        query_lens: Any,
        context_lens: Any,
        block_table: Any,
        slot_mapping: Any,
        timeout: float = 60.0,
    ) -> tuple[int, int]:
        """Describe the lane's next step to the worker; everything is copied at once.

        Parameters
        ----------
        num_decodes
            Requests that decode; they come first, with one query token each.
        query_lens, context_lens
            [num_requests], int32, CPU: new tokens, and tokens already in the cache.
        block_table
            [num_requests, max_blocks], int32, CPU, rows may be strided; only the blocks that a request's context and
            query fill are read.
        slot_mapping
            [num_tokens], int64, CPU; -1 for a token that is not stored.

        Returns
        -------
        tuple[int, int]
            Rows of q that `post` sends, and how many of these are prefill rows with context, which `collect` returns
            in `context_out` and `context_lse`.
        """
    def post(
        self,
        lane: int,
        layer: int,
        q: int,
        q_stride: int,
        k: int,
        k_stride: int,
        v: int,
        v_stride: int,
        timeout: float = 60.0,
    ) -> None:
        """Send one layer's q rows and all k, v. q, k, v: the step's tokens in order, [num_tokens, heads, head_size]."""
    def collect(
        self,
        lane: int,
        layer: int,
        out: int,
        out_stride: int,
        context_out: int = 0,
        context_lse: int = 0,
        timeout: float = 60.0,
    ) -> None:
        """Wait for one layer's output; returns at once if the step has no q rows.

        out: rows [0, num_decodes) are written. context_out: [context rows, num_heads, head_size], contiguous;
        context_lse: [context rows, num_heads], float32; both may be 0 if the step has no context rows.
        """
    def attend(
        self,
        lane: int,
        layer: int,
        q: int,
        q_stride: int,
        k: int,
        k_stride: int,
        v: int,
        v_stride: int,
        out: int,
        out_stride: int,
        context_out: int = 0,
        context_lse: int = 0,
        timeout: float = 60.0,
    ) -> None:
        """`post` and `collect` in one call."""
    def zero_blocks(self, block_ids: Any, timeout: float = 60.0) -> None:
        """Zero blocks in all layers. block_ids: [n], int32."""
    def copy_blocks(self, pairs: Any, timeout: float = 60.0) -> None:
        """Copy blocks in all layers, in order. pairs: [n, 2], int32, (source, destination)."""
