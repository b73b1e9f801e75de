// Zeroed anonymous memory on huge pages, for the KV pool.
#include "kernel/arena.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace lamina {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

Arena::Arena(size_t bytes) : data_(nullptr), size_(round_up(bytes)) {
  if (size_ < bytes) throw std::bad_alloc();  // rounding up wrapped around
  if (size_ == 0) return;
  // mmap aligns to 4 KiB only: take one huge page more and give the ends back.
  const size_t mapped = size_ + kHugePage;
  void* base =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  const auto start = reinterpret_cast<uintptr_t>(base);
  const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) munmap(base, aligned - start);
  const uintptr_t end = aligned + size_;
  if (start + mapped > end) munmap(reinterpret_cast<void*>(end), start + mapped - end);
  data_ = reinterpret_cast<std::byte*>(aligned);
  // Only advice: a kernel without transparent huge pages serves 4 KiB pages, slower but correct.
  madvise(data_, size_, MADV_HUGEPAGE);
}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, size_);
}

void Arena::clear() {
  if (data_ != nullptr) madvise(data_, size_, MADV_DONTNEED);
}

}  // namespace lamina
