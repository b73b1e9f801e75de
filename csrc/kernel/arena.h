// Zeroed anonymous memory on huge pages, for the KV pool.
#pragma once

#include <cstddef>

namespace lamina {

class Arena {
 public:
  // Maps `bytes` (rounded up to 2 MiB), 2 MiB aligned, with MADV_HUGEPAGE; pages are zero and taken at first touch.
  // Who writes just before or behind it is stopped by the system.
  // Throws std::bad_alloc where the system refuses.
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::byte* data_;
  size_t size_;
  void* base_ = nullptr;  // with the guards at both ends
  size_t mapped_ = 0;
};

}  // namespace lamina
