// Storage types of the KV dtypes, for overloads: float, and 16-bit values known by their bits.
//
// Functions are static: files with compiler flags of their own include them, see row_ops.h.
#pragma once

#include <bit>
#include <cstdint>

namespace lamina {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

[[gnu::always_inline]] static inline float widen(BFloat16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}

[[gnu::always_inline]] static inline BFloat16 narrow_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  // Rounding could turn a NaN into infinity.
  return {static_cast<uint16_t>(x != x ? (bits >> 16 | 0x40u) : rounded)};
}

}  // namespace lamina
