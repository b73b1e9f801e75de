"""A small KV pool for kernel tests: requests in blocks in random order, filled by `append`."""

from dataclasses import dataclass

import numpy as np
import reference

from vllm_lamina.kernels import Arena, AttentionKernel, ThreadPool


@dataclass(frozen=True)
class Geometry:
    """Shape of one test's attention and the KV dtype."""

    dtype: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int


class Pool:
    """One layer with requests of the given lengths; K and V are kept in float64 beside it."""

    def __init__(
        self,
        geometry: Geometry,
        isa: str,
        kv_lens: list[int],
        *,
        num_threads: int = 1,
        seed: int = 0,
        fill: int = 0xFF,
        chunk: int | None = None,
    ) -> None:
        self.geometry = geometry
        self.rng = np.random.default_rng(seed)
        self.threads = ThreadPool(num_threads, spin_us=0)
        self.kernel = AttentionKernel(
            geometry.dtype,
            geometry.num_heads,
            geometry.num_kv_heads,
            geometry.head_size,
            geometry.block_size,
            isa,
        )
        self.kv_lens = np.array(kv_lens, np.int32)
        needed = [-(-n // geometry.block_size) for n in kv_lens]
        num_blocks = sum(needed) + 2
        layer_bytes = num_blocks * self.kernel.block_bytes
        self.layer = Arena(layer_bytes).array()[:layer_bytes]
        self.layer[:] = fill  # 0xFF is NaN in every dtype: what a recycled block might hold
        ids = self.rng.permutation(num_blocks)[: sum(needed)].astype(np.int32)
        self.block_tables = np.zeros((len(kv_lens), max([1, *needed])), np.int32)
        self.k, self.v = [], []
        for request, (count, length) in enumerate(zip(needed, kv_lens, strict=True)):
            self.block_tables[request, :count], ids = ids[:count], ids[count:]
            k, v = self.tokens(length, geometry.num_kv_heads), self.tokens(length, geometry.num_kv_heads)
            for begin in range(0, length, chunk or max(length, 1)):
                end = min(length, begin + (chunk or length))
                self.append(request, begin, k[begin:end], v[begin:end])
            self.k.append(reference.from_bits(k, geometry.dtype))
            self.v.append(reference.from_bits(v, geometry.dtype))

    def tokens(self, count: int, heads: int) -> np.ndarray:
        """Normal random values ``[count, heads, head_size]`` in the KV dtype."""
        values = self.rng.standard_normal((count, heads, self.geometry.head_size))
        return reference.to_bits(values, self.geometry.dtype)

    def append(self, request: int, begin: int, k: np.ndarray, v: np.ndarray) -> None:
        """Store tokens ``begin ..`` of a request."""
        position = np.arange(begin, begin + len(k))
        blocks = self.block_tables[request, position // self.geometry.block_size].astype(np.int64)
        slots = blocks * self.geometry.block_size + position % self.geometry.block_size
        self.kernel.append(self.layer, k, v, slots, self.threads)

    def attend(self, q: np.ndarray, query_lens: list[int], scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Run the kernel; the output is widened to float64."""
        starts = np.cumsum([0, *query_lens]).astype(np.int32)
        out, lse = self.kernel.attend(
            self.layer, q, starts, self.kv_lens, self.block_tables, scale, self.threads
        )
        return reference.from_bits(out, self.geometry.dtype), lse

    def expected(self, q: np.ndarray, query_lens: list[int], scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Run the reference on what the kernel was given."""
        starts = np.cumsum([0, *query_lens])
        wide = reference.from_bits(q, self.geometry.dtype)
        parts = [
            reference.attention(wide[starts[i] : starts[i + 1]], self.k[i], self.v[i], scale)
            for i in range(len(query_lens))
        ]
        return np.concatenate([out for out, _ in parts]), np.concatenate([lse for _, lse in parts])
