// Attention of the same rows over disjoint sets of tokens, brought together by LSE in float32.
#pragma once

#include <cstddef>
#include <vector>

#include "kernel/attention_geometry.h"

namespace lamina {

// With A the normalised output and S = exp(LSE) the softmax denominator of each part, the whole is
// sum(A S) / sum(S) (the merge of the Lamina paper), computed relative to the largest LSE so that nothing overflows.
class LseMerge {
 public:
  // For rows of another layer; those before are forgotten.
  void reset(size_t num_rows, DType dtype, int32_t num_heads, int32_t head_size);
  // Takes a part of rows [first, first + count). out: [count, heads, head size] in dtype, lse: [count, heads].
  void begin(size_t first, size_t count, const std::byte* out, const float* lse);
  void add(size_t first, size_t count, const std::byte* out, const float* lse);
  // The whole of one row. out: [heads, head size]; lse, if not null: [heads]. sinks, if not null: [heads], logits that are
  // added to the denominator.
  void finish(size_t row, std::byte* out, float* lse, const float* sinks = nullptr) const;

 private:
  DType dtype_ = DType::kFloat32;
  int32_t num_heads_ = 0, head_size_ = 0;
  // They only grow.
  std::vector<float> out_;  // [rows, heads, head size], times the sum
  std::vector<float> max_;  // [rows, heads]
  std::vector<float> sum_;
};

}  // namespace lamina
