// Software prefetch that runs ahead of the reader through one region and on into the next.
#pragma once

#include <cstddef>

namespace lamina {
namespace {  // every ISA's file gets its own copy: they are compiled with different flags

class Prefetcher {
 public:
  Prefetcher(const std::byte* region, size_t bytes, const std::byte* next)
      : at_(region + (bytes < kDistance ? bytes : kDistance)), end_(region + bytes), next_(next) {
    if (at_ == end_) at_ = next_;
  }

  // Call once for every `Lines` cache lines read; `Lines` must divide a panel or tile.
  template <int Lines>
  void advance() {
    for (int i = 0; i < Lines; ++i) __builtin_prefetch(at_ + 64 * i);
    at_ += 64 * Lines;
    if (at_ == end_) at_ = next_;
  }

 private:
  // Measured: 8 KiB keeps the memory system busy and the lines are still in the L1 cache when they are used.
  static constexpr size_t kDistance = 8192;

  const std::byte* at_;
  const std::byte* end_;
  const std::byte* next_;
};

}  // namespace
}  // namespace lamina
