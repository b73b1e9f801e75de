"""Paged attention over a KV pool in the kernel's own block layout: the Python face of ``csrc/kernel``.

The attention worker's loop is native and calls the kernel directly; this face serves tests, benchmarks and
tools. It needs NumPy only. NumPy has no bfloat16: where the KV dtype is ``"bfloat16"``, arrays hold its bits
in ``uint16``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from vllm_lamina import _native
from vllm_lamina._native import ScoreRule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_lamina.kv_cache.geometry import DType

__all__ = ["Arena", "AttentionKernel", "ScoreRule", "ThreadPool", "available_isas"]

ISA = Literal["portable", "avx2", "avx512", "avx512_bf16", "amx"]
BFLOAT16_ISAS = ("avx512_bf16", "amx")
"""Variants for bfloat16 only."""
TokenArray = npt.NDArray[Any]
"""Tokens in the KV dtype: float32, float16, or uint16 for bfloat16."""


def available_isas(dtype: DType = "float32") -> list[str]:
    """Name the kernel variants that this CPU and this build can run for a KV dtype, best last.

    Parameters
    ----------
    dtype
        KV dtype; `BFLOAT16_ISAS` are listed for bfloat16 only.
    """
    return [isa for isa in _native.available_isas() if isa not in BFLOAT16_ISAS or dtype == "bfloat16"]


class Arena:
    """Zeroed memory on huge pages.

    Parameters
    ----------
    size
        Bytes, rounded up to 2 MiB. Pages are taken from the system at first touch.

    Raises
    ------
    MemoryError
        The system refuses the address space.
    """

    def __init__(self, size: int) -> None:
        self._native = _native.Arena(size)

    @property
    def size(self) -> int:
        """Bytes, a multiple of 2 MiB."""
        return int(self._native.size)

    def array(self) -> npt.NDArray[np.uint8]:
        """Return the memory, ``[size]`` uint8. The array keeps the arena alive."""
        array: npt.NDArray[np.uint8] = self._native.array()
        return array


class ThreadPool:
    """Threads that kernel calls run on; the calling thread is the first of them.

    Parameters
    ----------
    num_threads
        Threads in all, at least 1; more than there are CPUs makes every call slower.
    cpus
        CPU of each thread. The first is for the caller, see `pin_caller`.
    spin_us
        Microseconds that an idle thread spins before it sleeps; 0 where threads outnumber CPUs.

    Raises
    ------
    ValueError
        ``num_threads < 1``, a list of CPUs of another length, or a CPU that this process may not use.
    """

    def __init__(self, num_threads: int = 1, cpus: Sequence[int] = (), spin_us: int = 100) -> None:
        self._native = _native.ThreadPool(num_threads, list(cpus), spin_us)

    @property
    def size(self) -> int:
        """Number of threads, the caller's included."""
        return int(self._native.size)

    def pin_caller(self) -> None:
        """Pin the calling thread to the first CPU of the list."""
        self._native.pin_caller()


class AttentionKernel:
    """Paged attention of one geometry: `append` stores tokens into KV blocks, `attend` reads them.

    The KV pool of one layer is a uint8 array ``[num_blocks, block_bytes]``, of which the blocks may lie apart. What
    lies inside a block depends on the variant.

    Parameters
    ----------
    dtype
        Of q, k, v, the output and the KV pool.
    num_heads, num_kv_heads
        Query heads, a multiple of the KV heads.
    head_size
        Of q and k: 32 to 1024, a multiple of 16.
    block_size
        Tokens per KV block, a multiple of 16. The variants for bfloat16 only pad it to a multiple of 32.
    isa
        One of `available_isas`, by default the best of them.
    head_size_v
        Of v and the output, in the range of ``head_size``, which is its default.
    latent
        v is the first ``head_size_v`` elements of k, which alone is kept; for one KV head.

    Raises
    ------
    ValueError
        A geometry outside these ranges, or a variant that this CPU or dtype cannot use.

    Examples
    --------
    One request of 3 tokens in block 1 of a pool of 4 blocks:

    >>> kernel, threads = AttentionKernel("float32", 4, 2, 64, 32), ThreadPool()
    >>> layer = Arena(4 * kernel.block_bytes).array()[: 4 * kernel.block_bytes].reshape(4, -1)
    >>> tokens = np.ones((3, 2, 64), np.float32)
    >>> kernel.append(layer, tokens, tokens, np.array([32, 33, 34]), threads)
    >>> out, lse = kernel.attend(layer, np.zeros((1, 4, 64), np.float32), np.array([0, 1], np.int32),
    ...                          np.array([3], np.int32), np.array([[1]], np.int32), ScoreRule(0.125), threads)
    >>> out[0, 0, 0], lse[0, 0]  # the mean of V, and log(3)
    (np.float32(1.0), np.float32(1.0986123))
    """

    def __init__(
        self,
        dtype: DType,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        isa: str | None = None,
        head_size_v: int | None = None,
        latent: bool = False,
    ) -> None:
        self._native = _native.AttentionKernel(
            dtype, num_heads, num_kv_heads, head_size, block_size, isa, head_size_v, latent
        )
        self._head_size_v = head_size if head_size_v is None else head_size_v

    @property
    def isa(self) -> str:
        """Name of the variant in use."""
        return str(self._native.isa)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer: K, and V unless it is latent, of all KV heads, padding included."""
        return int(self._native.block_bytes)

    def append(
        self,
        layer: npt.NDArray[np.uint8],
        k: TokenArray,
        v: TokenArray | None,
        slot_mapping: npt.NDArray[np.int64],
        threads: ThreadPool,
    ) -> None:
        """Store tokens in their slots.

        Parameters
        ----------
        layer
            ``[num_blocks, block_bytes]``, uint8: written.
        k, v
            ``[num_tokens, num_kv_heads, head_size]``, for ``v`` ``head_size_v``, KV dtype; ``v`` of a latent cache is
            None.
        slot_mapping
            ``[num_tokens]``, int64: block id * block size + offset; a negative slot is skipped. A token at
            offset 0 zeroes its block first.

        Raises
        ------
        ValueError
            Shapes or dtypes that do not fit, a slot outside the layer.
        """
        self._native.append(layer, k, v, slot_mapping, threads._native)

    def attend(
        self,
        layer: npt.NDArray[np.uint8],
        q: TokenArray,
        query_start_loc: npt.NDArray[np.int32],
        kv_lens: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
        rule: ScoreRule,
        threads: ThreadPool,
        *,
        positions: npt.NDArray[np.int32] | None = None,
        block_positions: npt.NDArray[np.int32] | None = None,
        num_complete_tokens: int = 0,
    ) -> tuple[TokenArray, npt.NDArray[np.float32]]:
        """Compute ``softmax(scale * q K^T) V`` with its log-sum-exp; a request's queries see all its KV but what the
        rule hides.

        Parameters
        ----------
        layer
            ``[num_blocks, block_bytes]``, uint8.
        q
            ``[num_tokens, num_heads, head_size]``, KV dtype.
        query_start_loc
            ``[num_requests + 1]``, int32: first query token of each request, then the number of tokens.
        kv_lens
            ``[num_requests]``, int32: tokens in the blocks of its table.
        block_tables
            ``[num_requests, max_blocks]``, int32: block ids.
        rule
            What the layer does with scores.
        positions
            ``[num_requests]``, int32: position of each request's first query token. Needed for a window, a chunk and
            ALiBi.
        block_positions
            ``[num_requests, max_blocks]``, int32: position of each block's first token, by default as if a table held
            all of its request's blocks.
        num_complete_tokens
            The first query tokens, in whose output and LSE the sinks are counted; for the others who merges them does.

        Returns
        -------
        out
            ``[num_tokens, num_heads, head_size_v]``, KV dtype. 0 where nothing is seen.
        lse
            ``[num_tokens, num_heads]``, float32: natural logarithm of the softmax denominator.

        Raises
        ------
        ValueError
            Shapes or dtypes that do not fit, a block outside the layer.
        """
        out = np.empty((*q.shape[:2], self._head_size_v), q.dtype)
        lse = np.empty(q.shape[:2], np.float32)
        self._native.attend(
            layer,
            q,
            query_start_loc,
            kv_lens,
            block_tables,
            rule,
            out,
            lse,
            threads._native,
            positions,
            block_positions,
            num_complete_tokens,
        )
        return out, lse

    def copy_block(self, layer: npt.NDArray[np.uint8], source: int, destination: int) -> None:
        """Copy all of one block to another within a layer."""
        self._native.copy_block(layer, source, destination)

    def zero_block(self, layer: npt.NDArray[np.uint8], block: int) -> None:
        """Zero all of one block."""
        self._native.zero_block(layer, block)
