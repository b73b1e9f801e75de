// What the variants over the tile layout share: bfloat16 queries and softmax weights, float32 scores and
// sums.
#pragma once

#include <immintrin.h>

#include "kernel/isa/avx512_lanes.h"
#include "kernel/isa/rule.h"
#include "kernel/isa/softmax.h"
#include "kernel/row_ops.h"

namespace lamina {
namespace {  // every ISA's file gets its own copy: they are compiled with different flags

constexpr int kTileBytes = 1024, kTileLines = 16;
constexpr int kPairTokens = 32;  // tokens of a pair of K tiles, and of one V tile
constexpr int kRowStep = 32;     // rows that are taken through a block together

// Scratch of kRowStep rows: scores in float32, then weights in bfloat16.
size_t weights_bytes(int32_t block_size) {
  return (sizeof(float) + sizeof(BFloat16)) * kRowStep * block_size;
}

inline std::byte* bf16_weights(const RowTile& tile) {
  return reinterpret_cast<std::byte*>(tile.weights + static_cast<size_t>(kRowStep) * tile.block_size);
}

// Turns the scores of row first + r, the r-th of its step, into weights.
inline void weigh_row(const RowTile& tile, int first, int r, int num_tokens) {
  const size_t block_size = tile.block_size;
  float* scores = tile.weights + r * block_size;
  float scale = tile.scale_log2;
  if (!tile.rule.plain) {
    apply_rule<Avx512Lanes>(tile, first + r, scores, scale, num_tokens);
    scale = 1.0f;
  }
  std::byte* row = bf16_weights(tile) + r * block_size * sizeof(BFloat16);
  const auto put = [row](int i, __m256i x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i * sizeof(BFloat16)), x);
  };
  softmax_step<Avx512Lanes>(tile, first + r, scores, scale, num_tokens,
                            [put](int i, __m512 x) {
                              const __m256bh narrow = _mm512_cvtneps_pbh(x);
                              put(i, reinterpret_cast<const __m256i&>(narrow));
                            });
  // A V tile takes 32 tokens, the softmax steps by 16: the other half of the last tile has no weight.
  const int past_last = num_tokens % kPairTokens;
  if (past_last != 0 && past_last <= 16) put(num_tokens - past_last + 16, _mm256_setzero_si256());
}

// Dwords [row][column] to [column][row].
inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // Squares of four by four are done; now the squares.
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xDD);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xDD);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xDD);
  }
}

// A pair of K tiles, 32 tokens by 32 dims, as the pair of V tiles of the same.
inline void repack_pair(const std::byte* keys, std::byte* values) {
  alignas(64) static constexpr uint16_t kFirstDims[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                          37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                          11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first_dims = _mm512_load_si512(kFirstDims);
  const __m512i last_dims = _mm512_add_epi16(first_dims, _mm512_set1_epi16(16));
  for (int half = 0; half < 2; ++half) {  // of the tokens: a K tile, and eight lines of either V tile
    __m512i tokens[16];
    for (int i = 0; i < 16; ++i) tokens[i] = _mm512_loadu_si512(keys + half * kTileBytes + i * 64);
    transpose(tokens);
    for (int i = 0; i < 8; ++i) {
      const __m512i even = tokens[2 * i], odd = tokens[2 * i + 1];
      std::byte* line = values + (half * 8 + i) * 64;
      _mm512_storeu_si512(line, _mm512_permutex2var_epi16(even, first_dims, odd));
      _mm512_storeu_si512(line + kTileBytes, _mm512_permutex2var_epi16(even, last_dims, odd));
    }
  }
}

// Where V of a block lies: behind K, or, of a latent block, in the tile's scratch, where it is made of K.
inline const std::byte* values_of(const RowTile& tile, const std::byte* region, int token_pairs) {
  if (!tile.latent) return region + tile.key_bytes;
  const int key_pairs = tile.head_size / 32, value_pairs = tile.head_size_v / 32;
  for (int t = 0; t < token_pairs; ++t)
    for (int d = 0; d < value_pairs; ++d)
      repack_pair(region + (t * key_pairs + d) * 2 * kTileBytes,
                  tile.values + (d * (tile.block_size / kPairTokens) + t) * 2 * kTileBytes);
  return tile.values;
}

void pack_row(const void* q, int32_t head_size, float, void* packed) {
  auto* to = static_cast<BFloat16*>(packed);
  __builtin_memcpy(to, q, head_size * sizeof(BFloat16));
  // K is padded with zeros, but 0 * NaN is NaN.
  if (head_size % 32 != 0) __builtin_memset(to + head_size, 0, 16 * sizeof(BFloat16));
}

void store_row(const float* row, int32_t head_size_v, float factor, void* out) {
  auto* to = static_cast<BFloat16*>(out);
  for (int d = 0; d < head_size_v; d += 16)
    Avx512Lanes::store(to + d, _mm512_mul_ps(_mm512_loadu_ps(row + d), _mm512_set1_ps(factor)));
}

}  // namespace
}  // namespace lamina
