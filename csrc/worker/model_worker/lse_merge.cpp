#include "worker/model_worker/lse_merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernel/isa/elements.h"

// One build serves every CPU; the loops below are compiled for each of these, and chosen when the library is loaded.
// (ThreadSanitizer is not up yet then.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define LAMINA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LAMINA_CLONES
#endif

namespace lamina {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

[[gnu::always_inline]] inline float widen(float x) { return x; }
[[gnu::always_inline]] inline float widen(_Float16 x) { return static_cast<float>(x); }

[[gnu::always_inline]] inline void narrow(float x, float& to) { to = x; }
[[gnu::always_inline]] inline void narrow(float x, _Float16& to) { to = static_cast<_Float16>(x); }
[[gnu::always_inline]] inline void narrow(float x, BFloat16& to) { to = narrow_bfloat16(x); }

template <class T>
[[gnu::always_inline]] inline void add_scaled(float* to, float keep, const void* from, float weight, size_t n) {
  const auto* source = static_cast<const T*>(from);
  for (size_t i = 0; i < n; ++i) to[i] = to[i] * keep + widen(source[i]) * weight;
}
template <class T>
[[gnu::always_inline]] inline void store_scaled(void* to, const float* from, float factor, size_t n) {
  auto* target = static_cast<T*>(to);
  for (size_t i = 0; i < n; ++i) narrow(from[i] * factor, target[i]);
}

LAMINA_CLONES void add_scaled(DType dtype, float* to, float keep, const void* from, float weight, size_t n) {
  switch (dtype) {
    case DType::kFloat32: return add_scaled<float>(to, keep, from, weight, n);
    case DType::kBFloat16: return add_scaled<BFloat16>(to, keep, from, weight, n);
    case DType::kFloat16: return add_scaled<_Float16>(to, keep, from, weight, n);
  }
}

LAMINA_CLONES void store_scaled(DType dtype, void* to, const float* from, float factor, size_t n) {
  switch (dtype) {
    case DType::kFloat32: return store_scaled<float>(to, from, factor, n);
    case DType::kBFloat16: return store_scaled<BFloat16>(to, from, factor, n);
    case DType::kFloat16: return store_scaled<_Float16>(to, from, factor, n);
  }
}

}  // namespace

void LseMerge::reset(size_t num_rows, DType dtype, int32_t num_heads, int32_t head_size) {
  dtype_ = dtype, num_heads_ = num_heads, head_size_ = head_size;
  const size_t rows = num_rows * static_cast<size_t>(num_heads);
  if (rows > max_.size()) max_.resize(rows), sum_.resize(rows);
  if (rows * head_size > out_.size()) out_.resize(rows * head_size);
}

void LseMerge::begin(size_t first, size_t count, const std::byte* out, const float* lse) {
  const size_t begin = first * num_heads_, end = begin + count * num_heads_;
  std::fill(max_.begin() + begin, max_.begin() + end, kNegInf);
  std::fill(sum_.begin() + begin, sum_.begin() + end, 0.0f);
  std::fill(out_.begin() + begin * head_size_, out_.begin() + end * head_size_, 0.0f);
  add(first, count, out, lse);
}

void LseMerge::add(size_t first, size_t count, const std::byte* out, const float* lse) {
  const size_t head_bytes = head_size_ * element_size(dtype_);
  const size_t begin = first * num_heads_, end = begin + count * num_heads_;
  for (size_t i = begin; i < end; ++i, out += head_bytes, ++lse) {
    const float max = std::max(max_[i], *lse);
    if (max == kNegInf) continue;  // nothing attended yet
    const float keep = std::exp(max_[i] - max), weight = std::exp(*lse - max);
    add_scaled(dtype_, &out_[i * head_size_], keep, out, weight, head_size_);
    sum_[i] = sum_[i] * keep + weight;
    max_[i] = max;
  }
}

void LseMerge::finish(size_t row, std::byte* out, float* lse, const float* sinks) const {
  const size_t head_bytes = head_size_ * element_size(dtype_);
  for (size_t i = row * num_heads_; i < (row + 1) * num_heads_; ++i, out += head_bytes) {
    float sum = sum_[i];
    if (sinks != nullptr && sum > 0.0f) sum += std::exp(*sinks - max_[i]);
    if (sinks != nullptr) ++sinks;
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    store_scaled(dtype_, out, &out_[i * head_size_], factor, head_size_);
    if (lse != nullptr) *lse++ = max_[i] + std::log(sum);
  }
}

}  // namespace lamina
