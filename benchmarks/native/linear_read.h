// Reads memory front to back: the yardstick for everything that is bound by memory bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamina {

class ThreadPool;

// Each thread reads one contiguous share; `bytes` is rounded down to a multiple of 64 per thread. Returns a
// checksum, so that the reads cannot be optimised away.
uint64_t linear_read(const std::byte* data, size_t bytes, ThreadPool& threads);

}  // namespace lamina
