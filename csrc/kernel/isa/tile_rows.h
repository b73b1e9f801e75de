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
