// Attention over the panel layout for any vector unit: float32 arithmetic, KV converted in registers.
//
// `Lanes` is sixteen float32 lanes of one instruction set. It and everything here live in unnamed namespaces,
// so that each file in isa/ has its own copy, compiled with its own flags.
#pragma once

#include "kernel/attention.h"
#include "kernel/isa/elements.h"
#include "kernel/isa/prefetch.h"
#include "kernel/isa/rule.h"
#include "kernel/isa/softmax.h"
#include "kernel/row_ops.h"

namespace lamina {
namespace {

// Rows that are taken through a block together: their weights stay in the L1 cache beside a panel.
constexpr int kRowStep = 32;

template <class Lanes, class Element>
struct PanelAttention {
  using Vec = typename Lanes::Vec;
  static constexpr int kLinesPerTwo = 2 * 16 * sizeof(Element) / 64;

  // c[r][0..16) (+)= sum over i < depth of a[r][i] * panel[i][0..16), for R rows that stay in registers. Rows
  // of the panel lie `Step` elements apart, or with 0 `step`.
  template <int R, bool Accumulate, bool Prefetch, int Step>
  static void multiply_rows(const float* a, size_t a_stride, const Element* panel, size_t step, int depth,
                            float* c, size_t c_stride, Prefetcher& prefetch) {
    if (Step > 0) step = Step;
    // Few rows do not cover the latency of an FMA: even and odd i get accumulators of their own.
    constexpr bool kSplit = R <= 4;
    Vec even[R], odd[R];
    for (int r = 0; r < R; ++r) {
      even[r] = Accumulate ? Lanes::load(c + r * c_stride) : Lanes::broadcast(0.0f);
      if (kSplit) odd[r] = Lanes::broadcast(0.0f);
    }
    int i = 0;
    for (; i + 1 < depth; i += 2) {
      if (Prefetch) prefetch.advance(kLinesPerTwo);
      const Vec b0 = Lanes::load(panel + i * step), b1 = Lanes::load(panel + (i + 1) * step);
      for (int r = 0; r < R; ++r) even[r] = Lanes::fma(Lanes::broadcast(a[r * a_stride + i]), b0, even[r]);
      for (int r = 0; r < R; ++r) {
        Vec& sum = kSplit ? odd[r] : even[r];
        sum = Lanes::fma(Lanes::broadcast(a[r * a_stride + i + 1]), b1, sum);
      }
    }
    if (i < depth) {
      const Vec b = Lanes::load(panel + i * step);
      for (int r = 0; r < R; ++r) even[r] = Lanes::fma(Lanes::broadcast(a[r * a_stride + i]), b, even[r]);
    }
    for (int r = 0; r < R; ++r)
      Lanes::store(c + r * c_stride, kSplit ? Lanes::add(even[r], odd[r]) : even[r]);
  }

  // The same for 1 <= rows <= R: picks the function with exactly that many.
  template <int R, bool Accumulate, bool Prefetch, int Step>
  static void multiply_up_to(int rows, const float* a, size_t a_stride, const Element* panel, size_t step,
                             int depth, float* c, size_t c_stride, Prefetcher& prefetch) {
    if constexpr (R > 1) {
      if (rows < R)
        return multiply_up_to<R - 1, Accumulate, Prefetch, Step>(rows, a, a_stride, panel, step, depth, c,
                                                                 c_stride, prefetch);
    }
    multiply_rows<R, Accumulate, Prefetch, Step>(a, a_stride, panel, step, depth, c, c_stride, prefetch);
  }

  // All rows against one panel. Only the first rows bring the panel into the cache.
  template <bool Accumulate, int Step = 16>
  static void multiply_panel(bool cold, int rows, const float* a, size_t a_stride, const Element* panel,
                             int depth, float* c, size_t c_stride, Prefetcher& prefetch, size_t step = Step) {
    constexpr int R = Lanes::kRows;
    for (int r = 0; r < rows; r += R) {
      const float* a_rows = a + r * a_stride;
      float* c_rows = c + r * c_stride;
      if (cold && r == 0)
        multiply_up_to<R, Accumulate, true, Step>(rows, a_rows, a_stride, panel, step, depth, c_rows,
                                                  c_stride, prefetch);
      else
        multiply_up_to<R, Accumulate, false, Step>(rows - r, a_rows, a_stride, panel, step, depth, c_rows,
                                                   c_stride, prefetch);
    }
  }

  // scores[r][t] = a[r] . token t, for R rows and T tokens that lie one after another: sums by lane, whose
  // lanes are added at the end. A latent's rows are long, so that costs little.
  template <int R, int T>
  static void dot_rows(const float* a, const Element* tokens, size_t depth, float* scores,
                       size_t scores_stride) {
    Vec sums[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) sums[r][t] = Lanes::broadcast(0.0f);
    for (size_t d = 0; d < depth; d += 16) {
      Vec k[T];
      for (int t = 0; t < T; ++t) k[t] = Lanes::load(tokens + t * depth + d);
      for (int r = 0; r < R; ++r) {
        const Vec q = Lanes::load(a + r * depth + d);
        for (int t = 0; t < T; ++t) sums[r][t] = Lanes::fma(q, k[t], sums[r][t]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) scores[r * scores_stride + t] = Lanes::reduce_add(sums[r][t]);
  }

  // All rows against the first num_tokens tokens and those behind them up to a multiple of T, which are
  // zeros.
  static void dot_tokens(int rows, const float* a, const Element* tokens, size_t depth, int num_tokens,
                         float* scores, size_t scores_stride) {
    constexpr int R = Lanes::kRows / 2, T = Lanes::kRows / 2;  // as many sums as there are registers for
    for (int t = 0; t < num_tokens; t += T) {
      const Element* first = tokens + t * depth;
      int r = 0;
      for (; r + R <= rows; r += R)
        dot_rows<R, T>(a + r * depth, first, depth, scores + r * scores_stride + t, scores_stride);
      for (; r < rows; ++r)
        dot_rows<1, T>(a + r * depth, first, depth, scores + r * scores_stride + t, scores_stride);
    }
  }

  static void attend_block(const RowTile& tile, const std::byte* region, const std::byte* next,
                           int32_t num_tokens) {
    const size_t head_size = tile.head_size, head_size_v = tile.head_size_v, block_size = tile.block_size;
    const auto* keys = reinterpret_cast<const Element*>(region);
    const auto* values = reinterpret_cast<const Element*>(region + tile.key_bytes);
    Prefetcher prefetch(region, tile.region_bytes, next);
    for (int first = 0; first < tile.rows; first += kRowStep) {
      const int rows = tile.rows - first < kRowStep ? tile.rows - first : kRowStep;
      const float* queries = static_cast<const float*>(tile.queries) + first * head_size;
      if (tile.latent) {
        dot_tokens(rows, queries, keys, head_size, num_tokens, tile.weights, block_size);
      } else {
        for (int t = 0; t < num_tokens; t += 16)
          multiply_panel<false>(first == 0, rows, queries, head_size, keys + t * head_size, tile.head_size,
                                tile.weights + t, block_size, prefetch);
      }
      for (int r = 0; r < rows; ++r) {
        float* weights = tile.weights + r * block_size;
        if (!tile.rule.plain) apply_rule<Lanes>(tile, first + r, weights, 1.0f, num_tokens);
        softmax_step<Lanes>(tile, first + r, weights, 1.0f, num_tokens,
                            [weights](int i, Vec x) { Lanes::store(weights + i, x); });
      }
      for (size_t d = 0; d < head_size_v; d += 16) {
        float* out = tile.out + first * head_size_v + d;
        if (tile.latent)
          multiply_panel<true, 0>(false, rows, tile.weights, block_size, keys + d, num_tokens, out,
                                  head_size_v, prefetch, head_size);
        else
          multiply_panel<true>(first == 0, rows, tile.weights, block_size, values + d * block_size,
                               num_tokens, out, head_size_v, prefetch);
      }
    }
  }

  static void pack_row(const void* q, int32_t head_size, float scale_log2, void* packed) {
    const auto* from = static_cast<const Element*>(q);
    auto* to = static_cast<float*>(packed);
    for (int d = 0; d < head_size; d += 16)
      Lanes::store(to + d, Lanes::mul(Lanes::load(from + d), Lanes::broadcast(scale_log2)));
  }

  static void store_row(const float* row, int32_t head_size_v, float factor, void* out) {
    auto* to = static_cast<Element*>(out);
    for (int d = 0; d < head_size_v; d += 16)
      Lanes::store(to + d, Lanes::mul(Lanes::load(row + d), Lanes::broadcast(factor)));
  }

  static size_t weights_bytes(int32_t block_size) { return sizeof(float) * kRowStep * block_size; }
  static void no_tile_state(const RowTile&) {}
  static void no_state() {}

  static constexpr RowOps kOps{.row_granule = 1,
                               .max_rows = 4 * kRowStep,
                               .size_granule = 16,
                               .query_bytes = sizeof(float),
                               .repacks_values = false,
                               .weights_bytes = weights_bytes,
                               .pack_row = pack_row,
                               .store_row = store_row,
                               .begin = no_tile_state,
                               .end = no_state,
                               .attend_block = attend_block};
};

template <class Lanes>
const RowOps& panel_row_ops(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return PanelAttention<Lanes, BFloat16>::kOps;
    case DType::kFloat16: return PanelAttention<Lanes, Float16>::kOps;
    default: return PanelAttention<Lanes, float>::kOps;
  }
}

}  // namespace
}  // namespace lamina
