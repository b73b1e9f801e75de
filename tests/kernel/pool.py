"""A small KV pool for kernel tests: requests in blocks in random order, filled by `append`."""

from dataclasses import astuple, dataclass

import numpy as np
import reference
from reference import Rule

from vllm_lamina.kernels import Arena, AttentionKernel, ScoreRule, ThreadPool, available_isas

# K, V and q are the same rounded values on both sides: what differs is arithmetic and the output's rounding.
# Outputs are averages of unit normals, of order 1 / sqrt(kv_len) up to 4.
# float32: sums of up to a thousand float32 products and exponentials within 2 ulp.
# bfloat16, float16: half an ulp of the output (2^-9, 2^-12 relative); with AMX and AVX-512 BF16 the softmax
# weights are bf16 too, of which the errors average out over the tokens. LSE never leaves float32.
OUT_TOLERANCE = {
    "float32": {"rtol": 2e-5, "atol": 5e-6},
    "bfloat16": {"rtol": 1e-2, "atol": 6e-3},
    "float16": {"rtol": 1e-3, "atol": 2e-4},
}
LSE_TOLERANCE = {"rtol": 2e-6, "atol": 2e-5}

VARIANTS = [(dtype, isa) for dtype in OUT_TOLERANCE for isa in available_isas(dtype)]


@dataclass(frozen=True)
class Geometry:
    """Shape of one test's attention and the KV dtype."""

    dtype: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    head_size_v: int = 0
    """By default as ``head_size``."""
    latent: bool = False

    @property
    def value_size(self) -> int:
        """Head size of v and the output."""
        return self.head_size_v or self.head_size


@dataclass(frozen=True)
class Queries:
    """What one attend call asks: query tokens by request, and where they and the blocks are."""

    lens: list[int]
    positions: list[int] | None = None
    """Of each request's first query token. By default one token is the last of the KV (a decode), and several follow
    the KV (a prefill chunk over its context)."""
    block_positions: np.ndarray | None = None
    num_complete: int = 0


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
        padding: int = 0,
    ) -> None:
        self.geometry = geometry
        self.rng = np.random.default_rng(seed)
        self.threads = ThreadPool(num_threads, spin_us=0)
        self.kernel = AttentionKernel(*astuple(geometry)[:5], isa, geometry.value_size, geometry.latent)
        self.kv_lens = np.array(kv_lens, np.int32)
        needed = [-(-n // geometry.block_size) for n in kv_lens]
        num_blocks, stride = sum(needed) + 2, self.kernel.block_bytes + padding
        self.memory = Arena(num_blocks * stride).array()[: num_blocks * stride].reshape(num_blocks, stride)
        self.memory[:] = fill  # 0xFF is NaN in every dtype: what a recycled block might hold
        self.layer = self.memory[:, : self.kernel.block_bytes]
        ids = self.rng.permutation(num_blocks)[: sum(needed)].astype(np.int32)
        self.block_tables = np.zeros((len(kv_lens), max([1, *needed])), np.int32)
        self.k, self.v = [], []
        for request, (count, length) in enumerate(zip(needed, kv_lens, strict=True)):
            self.block_tables[request, :count], ids = ids[:count], ids[count:]
            k = self.tokens(length, geometry.num_kv_heads)
            if geometry.latent:
                v = k[..., : geometry.value_size]
            else:
                v = self.tokens(length, geometry.num_kv_heads, geometry.value_size)
            for begin in range(0, length, chunk or max(length, 1)):
                end = min(length, begin + (chunk or length))
                self.append(request, begin, k[begin:end], v[begin:end])
            self.k.append(reference.from_bits(k, geometry.dtype))
            self.v.append(reference.from_bits(v, geometry.dtype))

    def tokens(self, count: int, heads: int, size: int | None = None) -> np.ndarray:
        """Normal random values ``[count, heads, size]`` in the KV dtype; by default of q and k."""
        values = self.rng.standard_normal((count, heads, size or self.geometry.head_size))
        return reference.to_bits(values, self.geometry.dtype)

    def append(self, request: int, begin: int, k: np.ndarray, v: np.ndarray) -> None:
        """Store tokens ``begin ..`` of a request."""
        position = np.arange(begin, begin + len(k))
        blocks = self.block_tables[request, position // self.geometry.block_size].astype(np.int64)
        slots = blocks * self.geometry.block_size + position % self.geometry.block_size
        self.kernel.append(self.layer, k, None if self.geometry.latent else v, slots, self.threads)

    def positions(self, queries: Queries) -> list[int]:
        """Position of each request's first query token."""
        default = [
            max(0, kv_len - (length == 1))
            for kv_len, length in zip(self.kv_lens.tolist(), queries.lens, strict=True)
        ]
        return queries.positions or default

    def key_positions(self, queries: Queries, request: int) -> np.ndarray:
        """Position of each key of a request."""
        index, size = np.arange(self.kv_lens[request]), self.geometry.block_size
        if queries.block_positions is None:
            return index
        return queries.block_positions[request, index // size] + index % size

    def attend(self, q: np.ndarray, queries: Queries, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """Run the kernel; the output is widened to float64."""
        starts = np.cumsum([0, *queries.lens]).astype(np.int32)
        out, lse = self.kernel.attend(
            self.layer,
            q,
            starts,
            self.kv_lens,
            self.block_tables,
            ScoreRule(*astuple(rule)),
            self.threads,
            positions=np.array(self.positions(queries), np.int32),
            block_positions=queries.block_positions,
            num_complete_tokens=queries.num_complete,
        )
        return reference.from_bits(out, self.geometry.dtype), lse

    def expected(self, q: np.ndarray, queries: Queries, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """Run the reference on what the kernel was given."""
        starts = np.cumsum([0, *queries.lens])
        wide = reference.from_bits(q, self.geometry.dtype)
        complete = np.arange(len(q)) < queries.num_complete
        parts = []
        for i, position in enumerate(self.positions(queries)):
            mine = slice(starts[i], starts[i + 1])
            at = position + np.arange(queries.lens[i])
            keys = self.key_positions(queries, i)
            parts.append(
                reference.attention(wide[mine], self.k[i], self.v[i], rule, at, keys, complete[mine])
            )
        return np.concatenate([out for out, _ in parts]), np.concatenate([lse for _, lse in parts])

    def check(self, queries: Queries, rule: Rule | None = None, slack: float = 1.0) -> None:
        """Compare output and LSE of one attend call with the reference."""
        rule = rule or Rule(self.geometry.head_size**-0.5)
        q = self.tokens(sum(queries.lens), self.geometry.num_heads)
        out, lse = self.attend(q, queries, rule)
        expected_out, expected_lse = self.expected(q, queries, rule)
        np.testing.assert_allclose(lse, expected_lse, **LSE_TOLERANCE)
        tolerance = {name: slack * value for name, value in OUT_TOLERANCE[self.geometry.dtype].items()}
        np.testing.assert_allclose(out, expected_out, **tolerance)
