// One block's step of the online softmax (Milakov and Gimelshein, 2018, algorithm 3) for one row.
#pragma once

#include "kernel/row_ops.h"

namespace lamina {
namespace {  // every ISA's file gets its own copy: they are compiled with different flags

// Turns scores[0 .. num_tokens) into weights relative to the row's running maximum, after the maximum, the
// denominator and the output row have been brought up to date. Scores are multiplied by `scale`; the result
// is in units of log2. Up to the next multiple of 16 the weights are zero. `put(i, weights)` takes weights i
// .. i + 15.
template <class Lanes, class Put>
inline void softmax_step(const RowTile& tile, int row, const float* scores, float scale, int num_tokens,
                         Put put) {
  constexpr float kNegInf = -__builtin_inff();
  const auto factor = Lanes::broadcast(scale);
  const auto score = [&](int i) {
    const auto x = Lanes::mul(Lanes::load(scores + i), factor);
    return i + 16 <= num_tokens ? x : Lanes::keep_first(x, num_tokens - i, kNegInf);
  };
  auto lane_max = Lanes::broadcast(kNegInf);
  for (int i = 0; i < num_tokens; i += 16) lane_max = Lanes::max(lane_max, score(i));
  const float block_max = Lanes::reduce_max(lane_max);
  float& max = tile.max[row];
  if (block_max > max) {
    const float shrink = __builtin_exp2f(max - block_max);
    max = block_max;
    tile.sum[row] *= shrink;
    float* out = tile.out + static_cast<size_t>(row) * tile.head_size_v;
    const auto shrink_all = Lanes::broadcast(shrink);
    for (int d = 0; d < tile.head_size_v; d += 16)
      Lanes::store(out + d, Lanes::mul(Lanes::load(out + d), shrink_all));
  }
  // While every score is -inf there is no maximum to subtract: -inf - -inf would be NaN.
  const auto reference = Lanes::broadcast(max == kNegInf ? 0.0f : max);
  auto sum = Lanes::broadcast(0.0f);
  for (int i = 0; i < num_tokens; i += 16) {
    const auto weight = Lanes::exp2(Lanes::sub(score(i), reference));
    sum = Lanes::add(sum, weight);
    put(i, weight);
  }
  tile.sum[row] += Lanes::reduce_add(sum);
}

}  // namespace
}  // namespace lamina
