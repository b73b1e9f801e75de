// Attention in plain C++, for every CPU; also the yardstick that the compiler's own vectorisation sets.
#include <bit>
#include <cstdint>

#include "kernel/isa/panel_attention.h"
#include "kernel/isa/variants.h"

namespace lamina {
namespace {

float widen(Float16 x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u)  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // The exponent bias differs by 112; the multiplication also normalises float16's denormals.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

Float16 narrow_float16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u,
                 magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};   // NaN
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // rounds to 2^16 or more
  if (magnitude <
      0x38800000u) {  // below 2^-14: adding 1/2 leaves multiples of 2^-24 in the low bits, rounded
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13)};
}

struct PlainLanes {
  static constexpr int kRows = 4;
  struct Vec {
    float lane[16];
  };

  template <class Function>
  static Vec each(Function function) {
    Vec out;
    for (int i = 0; i < 16; ++i) out.lane[i] = function(i);
    return out;
  }

  static Vec broadcast(float x) {
    return each([=](int) { return x; });
  }
  static Vec load(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static Vec load(const BFloat16* p) {
    return each([=](int i) { return widen(p[i]); });
  }
  static Vec load(const Float16* p) {
    return each([=](int i) { return widen(p[i]); });
  }
  static void store(float* p, const Vec& x) {
    for (int i = 0; i < 16; ++i) p[i] = x.lane[i];
  }
  static void store(BFloat16* p, const Vec& x) {
    for (int i = 0; i < 16; ++i) p[i] = narrow_bfloat16(x.lane[i]);
  }
  static void store(Float16* p, const Vec& x) {
    for (int i = 0; i < 16; ++i) p[i] = narrow_float16(x.lane[i]);
  }
  static Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Vec mul(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Vec add(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Vec sub(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Vec div(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static Vec max(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Vec keep_first(const Vec& x, int n, float rest) {
    return each([&](int i) { return i < n ? x.lane[i] : rest; });
  }
  static float reduce_max(const Vec& x) {
    float result = x.lane[0];
    for (int i = 1; i < 16; ++i) result = x.lane[i] > result ? x.lane[i] : result;
    return result;
  }
  static float reduce_add(const Vec& x) {
    float result = 0;
    for (int i = 0; i < 16; ++i) result += x.lane[i];
    return result;
  }
  static Vec exp2(const Vec& x) {
    return each([&](int i) { return __builtin_exp2f(x.lane[i]); });
  }
};

}  // namespace

const RowOps& portable_row_ops(DType dtype) { return panel_row_ops<PlainLanes>(dtype); }

}  // namespace lamina
