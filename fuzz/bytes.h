// An input of a fuzz target, read as numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace lamina::fuzz {

// Reads an input front to back; past its end everything is 0.
class Bytes {
 public:
  explicit Bytes(std::span<const uint8_t> bytes) : bytes_(bytes) {}
  bool empty() const { return bytes_.empty(); }
  uint8_t byte();
  uint64_t number();  // a byte that picks one of the numbers where code goes wrong, or the next eight bytes
  std::span<const uint8_t> take(size_t count);

 private:
  std::span<const uint8_t> bytes_;
};

}  // namespace lamina::fuzz
