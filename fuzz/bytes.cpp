#include "bytes.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace lamina::fuzz {

uint8_t Bytes::byte() {
  if (bytes_.empty()) return 0;
  const uint8_t value = bytes_.front();
  bytes_ = bytes_.subspan(1);
  return value;
}

uint64_t Bytes::number() {
  static constexpr uint64_t kNumbers[] = {0,          1,          2,          7,          8,          31,
                                          32,         33,         63,         64,         65,         127,
                                          128,        255,        256,        4095,       4096,       65535,
                                          0x7ffffff0, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff, 0x100000000,
                                          1ull << 40, 1ull << 62, (1ull << 63) - 1, 1ull << 63, ~63ull, ~0ull - 1, ~0ull};
  const uint8_t pick = byte();
  if (pick < std::size(kNumbers)) return kNumbers[pick];
  if (pick < 200) return pick;
  uint64_t value = 0;
  const auto raw = take(8);
  if (!raw.empty()) std::memcpy(&value, raw.data(), raw.size());
  return value;
}

std::span<const uint8_t> Bytes::take(size_t count) {
  const auto taken = bytes_.first(std::min(count, bytes_.size()));
  bytes_ = bytes_.subspan(taken.size());
  return taken;
}

}  // namespace lamina::fuzz
