// Storage types of the KV dtypes, for overloads: float, and 16-bit values known by their bits.
#pragma once

#include <cstdint>

namespace lamina {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace lamina
