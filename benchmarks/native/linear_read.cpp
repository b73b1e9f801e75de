// Reads memory front to back: the yardstick for everything that is bound by memory bandwidth.
#include "linear_read.h"

#include <atomic>

#include "kernel/thread_pool.h"

namespace lamina {
namespace {

// 16 bytes, which every compiler here loads with one instruction; wider loads read no faster (measured).
using Vector = uint64_t __attribute__((vector_size(16), aligned(8), may_alias));

}  // namespace

uint64_t linear_read(const std::byte* data, size_t bytes, ThreadPool& threads) {
  const size_t share = bytes / threads.size() / 64 * 64;
  std::atomic<uint64_t> checksum{0};
  threads.run([&](int thread) {
    const auto* at = reinterpret_cast<const Vector*>(data + thread * share);
    Vector sums[4] = {};
    for (const Vector* end = at + share / sizeof(Vector); at != end; at += 4)
      for (int i = 0; i < 4; ++i) sums[i] ^= at[i];
    const Vector sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    checksum.fetch_xor(sum[0] ^ sum[1], std::memory_order_relaxed);
  });
  return checksum;
}

}  // namespace lamina
