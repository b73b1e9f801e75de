// What a layer's rule does to one row's scores of one block before the softmax: soft-cap, ALiBi, hidden keys.
#pragma once

#include "kernel/row_ops.h"

namespace lamina {
namespace {  // every ISA's file gets its own copy: they are compiled with different flags

// Within 5 ulp, NaN for NaN. The rational approximation of Eigen's ptanh: beyond its edge float32's tanh is 1.
template <class Lanes>
inline typename Lanes::Vec tanh(typename Lanes::Vec x) {
  constexpr float kEdge = 7.90531110763549805f;
  constexpr float kOdd[] = {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f,
                            5.12229709037114e-08f,  1.48572235717979e-05f, 6.37261928875436e-04f,
                            4.89352455891786e-03f};
  constexpr float kEven[] = {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f,
                             4.89352518554385e-03f};
  // max(a, x) keeps a NaN x; the minimum is a maximum of negated values.
  const auto zero = Lanes::broadcast(0.0f), lowest = Lanes::broadcast(-kEdge);
  x = Lanes::sub(zero, Lanes::max(lowest, Lanes::sub(zero, Lanes::max(lowest, x))));
  const auto square = Lanes::mul(x, x);
  auto p = Lanes::broadcast(kOdd[0]), q = Lanes::broadcast(kEven[0]);
  for (int i = 1; i < 7; ++i) p = Lanes::fma(p, square, Lanes::broadcast(kOdd[i]));
  for (int i = 1; i < 4; ++i) q = Lanes::fma(q, square, Lanes::broadcast(kEven[i]));
  return Lanes::div(Lanes::mul(x, p), q);
}

// Replaces scores[0 .. num_tokens), as they come from the product, by what the softmax takes, in units of log2;
// `scale` brings the product there. Keys that the row does not see get -inf. Not inlined: layers without a rule
// keep the code that they would have without this.
template <class Lanes>
[[gnu::noinline]] void apply_rule(const RowTile& tile, int row, float* scores, float scale, int num_tokens) {
  const RowRule& rule = tile.rule;
  int hidden = 0;
  if (rule.first_seen != nullptr) {
    const int64_t first = int64_t{rule.first_seen[row]} - tile.block_position;
    hidden = first <= 0 ? 0 : first < num_tokens ? static_cast<int>(first) : num_tokens;
  }
  for (int i = hidden / 16 * 16; i < num_tokens; i += 16) {
    auto x = Lanes::mul(Lanes::load(scores + i), Lanes::broadcast(scale));
    if (rule.soft_cap_log2 != 0.0f) {
      const auto cap = Lanes::broadcast(rule.soft_cap_log2);
      x = Lanes::mul(cap, tanh<Lanes>(Lanes::div(x, cap)));
    }
    if (rule.slopes_log2 != nullptr) {
      alignas(64) static constexpr float kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const int64_t distance = int64_t{tile.block_position} + i - rule.positions[row];
      x = Lanes::fma(Lanes::add(Lanes::load(kLane), Lanes::broadcast(static_cast<float>(distance))),
                     Lanes::broadcast(rule.slopes_log2[row]), x);
    }
    Lanes::store(scores + i, x);
  }
  for (int i = 0; i < hidden; ++i) scores[i] = -__builtin_inff();
}

}  // namespace
}  // namespace lamina
