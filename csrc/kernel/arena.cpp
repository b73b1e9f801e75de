// Zeroed anonymous memory on huge pages, for the KV pool.
#include "kernel/arena.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "base/round_up.h"

#if defined(__SANITIZE_ADDRESS__)
#define LAMINA_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LAMINA_ADDRESS_SANITIZER
#endif
#endif
#ifdef LAMINA_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif

namespace lamina {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kGuard = 4096;  // at least, before and behind the memory: nobody may touch it

}  // namespace

Arena::Arena(size_t bytes) : data_(nullptr), size_(round_up(bytes, kHugePage)) {
  if (size_ < bytes) throw std::bad_alloc();  // rounding up wrapped around
  if (size_ == 0) return;
  // mmap aligns to 4 KiB only: take more, and leave the ends without access.
  mapped_ = size_ + kHugePage + 2 * kGuard;
  if (mapped_ < size_) throw std::bad_alloc();
  base_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) throw std::bad_alloc();
  const auto start = reinterpret_cast<uintptr_t>(base_);
  data_ = reinterpret_cast<std::byte*>(round_up(start + kGuard, kHugePage));
  if (mprotect(data_, size_, PROT_READ | PROT_WRITE) != 0) {
    munmap(base_, mapped_);
    throw std::bad_alloc();
  }
  // Only advice: a kernel without transparent huge pages serves 4 KiB pages, slower but correct.
  madvise(data_, size_, MADV_HUGEPAGE);
#ifdef LAMINA_ADDRESS_SANITIZER
  __asan_poison_memory_region(data_ + bytes, size_ - bytes);
#endif
}

Arena::~Arena() {
  if (data_ == nullptr) return;
#ifdef LAMINA_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(data_, size_);
#endif
  munmap(base_, mapped_);
}

}  // namespace lamina
