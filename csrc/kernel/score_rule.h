// What a layer does with scores: scale, soft-cap, window, chunk, sinks and ALiBi.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernel/attention_geometry.h"

namespace lamina {

// Constant per layer, chosen when the pool is configured. A key at position j is seen by the query at position
// p (j <= p) iff (no window or j > p - window) and (no chunk or j >= p / chunk * chunk).
struct ScoreRule {
  float scale;
  float soft_cap = 0;  // score = soft_cap * tanh(scale * q.k / soft_cap); 0: none
  int32_t window = 0;  // tokens that a query sees, its own among them; 0: all
  int32_t chunk = 0;   // tokens of a chunk, across whose edges nothing is seen; 0: none
  // By query head, or empty: a logit that is added to the softmax denominator only.
  std::vector<float> sinks = {};
  // By query head, or empty: slope * (key position - query position) is added to the score, after scale and
  // soft-cap.
  std::vector<float> alibi_slopes = {};

  bool hides() const { return window > 0 || chunk > 0; }
  bool needs_positions() const { return hides() || !alibi_slopes.empty(); }
  // Position of the first key that the query at `position` sees; never less for a later query.
  int64_t first_seen(int64_t position) const {
    int64_t first = 0;
    if (window > 0) first = std::max<int64_t>(first, position - window + 1);
    if (chunk > 0) first = std::max<int64_t>(first, position / chunk * chunk);
    return first;
  }
};

// Throws std::invalid_argument, naming the value and the limit, for a rule that does not fit the geometry.
void check_score_rule(const ScoreRule& rule, const AttentionGeometry& geometry);

}  // namespace lamina
