// Attention with AVX-512 BF16: VDPBF16PS for both products, float32 sums and softmax.
//
// One instruction multiplies a line of a tile, 16 columns x 2 values of the reduction axis, by two values of
// a row and adds to the row's 16 sums; denormal values count as zero. With one such instruction per cycle
// (Zen 4), eight rows take a core longer than reading the line from memory.
#include <immintrin.h>

#include "kernel/isa/prefetch.h"
#include "kernel/isa/tile_rows.h"
#include "kernel/isa/variants.h"

namespace lamina {
namespace {

constexpr int kRows = 8;  // whose sums stay in registers

// To the L2 cache, from where the hardware fetches ahead by itself. Measured on Zen 4: to L1, four and eight
// rows were up to a fifth slower.
using FarPrefetcher = PrefetcherTo<6144, 2>;
// With so few rows the hardware's own prefetch from memory is the faster one, and every other line is left to
// it: without any of these prefetches, and with all of them, 5 to 25% slower. With more rows it falls behind.
constexpr int kFewRows = 3;

// sums[r] += row r times one tile, for R rows.
template <int R, bool Prefetch>
inline void multiply_tile(const std::byte* rows, size_t row_bytes, const std::byte* tile, __m512 (&sums)[R],
                          FarPrefetcher& prefetch) {
  for (int i = 0; i < kTileLines; ++i) {
    if (Prefetch && R <= kFewRows && i % 2 != 0)
      prefetch.skip_line();
    else if (Prefetch)
      prefetch.advance(1);
    const auto line = (__m512bh)_mm512_loadu_si512(tile + i * 64);
    for (int r = 0; r < R; ++r) {
      int pair;
      __builtin_memcpy(&pair, rows + r * row_bytes + i * sizeof(pair), sizeof(pair));
      sums[r] = _mm512_dpbf16_ps(sums[r], line, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
}

// sums[r][0 .. 31] (+)= row r times `tile_pairs` (>= 1) pairs of tiles side by side, for R rows. Memory is
// read in the order in which it lies: alternating between the tiles of a pair was slower by up to a sixth.
template <int R, bool Accumulate, bool Prefetch>
void multiply_rows(const std::byte* rows, size_t row_bytes, const std::byte* tiles, int tile_pairs,
                   float* sums, size_t sums_stride, FarPrefetcher& shared_prefetch) {
  FarPrefetcher prefetch = shared_prefetch;  // in registers
  __m512 left[R], right[R];
  for (int r = 0; r < R; ++r) {
    left[r] = Accumulate ? _mm512_loadu_ps(sums + r * sums_stride) : _mm512_setzero_ps();
    right[r] = Accumulate ? _mm512_loadu_ps(sums + r * sums_stride + 16) : _mm512_setzero_ps();
  }
  const std::byte* end = tiles + tile_pairs * 2 * kTileBytes;
  do {
    multiply_tile<R, Prefetch>(rows, row_bytes, tiles, left, prefetch);
    multiply_tile<R, Prefetch>(rows, row_bytes, tiles + kTileBytes, right, prefetch);
    rows += 2 * kTileLines * sizeof(BFloat16);
    tiles += 2 * kTileBytes;
  } while (tiles != end);
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(sums + r * sums_stride, left[r]);
    _mm512_storeu_ps(sums + r * sums_stride + 16, right[r]);
  }
  if (Prefetch) shared_prefetch = prefetch;
}

// The same for 1 <= rows <= R: picks the function with exactly that many.
template <int R, bool Accumulate, bool Prefetch>
void multiply_up_to(int num_rows, const std::byte* rows, size_t row_bytes, const std::byte* tiles,
                    int tile_pairs, float* sums, size_t sums_stride, FarPrefetcher& prefetch) {
  if constexpr (R > 1) {
    if (num_rows < R)
      return multiply_up_to<R - 1, Accumulate, Prefetch>(num_rows, rows, row_bytes, tiles, tile_pairs, sums,
                                                         sums_stride, prefetch);
  }
  multiply_rows<R, Accumulate, Prefetch>(rows, row_bytes, tiles, tile_pairs, sums, sums_stride, prefetch);
}

// All rows of a step. Only the first of them bring the tiles into the cache, if they are cold.
template <bool Accumulate>
void multiply(bool cold, int num_rows, const std::byte* rows, size_t row_bytes, const std::byte* tiles,
              int tile_pairs, float* sums, size_t sums_stride, FarPrefetcher& prefetch) {
  for (int r = 0; r < num_rows; r += kRows) {
    const std::byte* from = rows + r * row_bytes;
    float* to = sums + r * sums_stride;
    if (cold && r == 0)
      multiply_up_to<kRows, Accumulate, true>(num_rows, from, row_bytes, tiles, tile_pairs, to, sums_stride,
                                              prefetch);
    else
      multiply_up_to<kRows, Accumulate, false>(num_rows - r, from, row_bytes, tiles, tile_pairs, to,
                                               sums_stride, prefetch);
  }
}

void attend_block(const RowTile& tile, const std::byte* region, const std::byte* next, int32_t num_tokens) {
  const size_t width = tile.head_size_v, block_size = tile.block_size;
  const size_t query_bytes = tile.head_size * sizeof(BFloat16), weight_bytes = block_size * sizeof(BFloat16);
  const int key_pairs = tile.head_size / 32, value_pairs = tile.head_size_v / 32;
  const int token_pairs = (num_tokens + kPairTokens - 1) / kPairTokens;
  const std::byte* values = values_of(tile, region, token_pairs);
  FarPrefetcher prefetch(region, tile.region_bytes, next);
  for (int first = 0; first < tile.rows; first += kRowStep) {
    const bool cold = first == 0;
    const int rows = tile.rows - first < kRowStep ? tile.rows - first : kRowStep;
    const auto* queries = static_cast<const std::byte*>(tile.queries) + first * query_bytes;
    for (int t = 0; t < token_pairs; ++t)
      multiply<false>(cold, rows, queries, query_bytes, region + t * key_pairs * 2 * kTileBytes, key_pairs,
                      tile.weights + t * kPairTokens, block_size, prefetch);
    for (int r = 0; r < rows; ++r) weigh_row(tile, first, r, num_tokens);
    for (int d = 0; d < value_pairs; ++d)
      multiply<true>(cold, rows, bf16_weights(tile), weight_bytes,
                     values + d * block_size / kPairTokens * 2 * kTileBytes, token_pairs,
                     tile.out + first * width + d * 32, width, prefetch);
  }
}

void no_tile_state(const RowTile&) {}
void no_state() {}

constexpr RowOps kOps{.row_granule = 1,
                      .max_rows = 4 * kRowStep,
                      .size_granule = 32,
                      .query_bytes = sizeof(BFloat16),
                      .repacks_values = true,
                      .weights_bytes = weights_bytes,
                      .pack_row = pack_row,
                      .store_row = store_row,
                      .begin = no_tile_state,
                      .end = no_state,
                      .attend_block = attend_block};

}  // namespace

const RowOps& avx512_bf16_row_ops() { return kOps; }

}  // namespace lamina
