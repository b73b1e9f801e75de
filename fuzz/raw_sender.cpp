#include "raw_sender.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <thread>

namespace lamina::fuzz {
namespace {

constexpr size_t kControlBytes = 16384;

template <typename Ready>
bool wait_until(Ready ready, std::chrono::milliseconds timeout) {
  const auto end = std::chrono::steady_clock::now() + timeout;
  for (int i = 0; !ready(); ++i) {
    if (std::chrono::steady_clock::now() > end) return false;
    if (i < 100) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return true;
}

}  // namespace

// As in shm_channel.cpp; a test of the channel's layout would be this file failing to talk to the worker at all.
struct alignas(64) RawSender::Slot {
  std::atomic<uint64_t> sequence, offset, bytes;
};

struct RawSender::Ring {
  alignas(64) std::atomic<uint64_t> consumed;
  alignas(64) std::atomic<uint32_t> receiver_waiting;
  alignas(64) std::atomic<uint32_t> sender_waiting;
  Slot slots[kSlots];
};

RawSender::RawSender(int memory_fd, size_t ring_bytes)
    : map_bytes_(kControlBytes + 2 * ring_bytes), ring_bytes_(ring_bytes) {
  void* map = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
  if (map == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  map_ = static_cast<std::byte*>(map);
  to_worker_ = reinterpret_cast<Ring*>(map_ + 64);
  from_worker_ = to_worker_ + 1;
  data_ = map_ + kControlBytes;
}

RawSender::~RawSender() { munmap(map_, map_bytes_); }

bool RawSender::drained(std::chrono::milliseconds timeout) {
  return wait_until([&] { return to_worker_->consumed.load() == posted_; }, timeout);
}

bool RawSender::send(std::span<const std::byte> frame, const Lie* lie, std::chrono::milliseconds timeout) {
  const size_t padded = (frame.size() + 63) / 64 * 64;
  // The ring is used like a tape: back to its begin when it is used up, once all that lies there was consumed.
  if (next_ + padded > ring_bytes_ || posted_ - to_worker_->consumed.load() >= kSlots) {
    if (!drained(timeout)) return false;
    next_ = 0;
  }
  if (!frame.empty()) std::memcpy(data_ + next_, frame.data(), frame.size());
  Slot& slot = to_worker_->slots[posted_ % kSlots];
  slot.offset.store(lie != nullptr ? lie->offset : next_);
  slot.bytes.store(lie != nullptr ? lie->bytes : frame.size());
  next_ += padded;
  slot.sequence.store(++posted_);
  if (to_worker_->receiver_waiting.exchange(0) != 0)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&to_worker_->receiver_waiting), FUTEX_WAKE, 1, nullptr, nullptr, 0);
  return true;
}

void RawSender::claim_consumed(uint64_t frames) { from_worker_->consumed.store(frames); }

}  // namespace lamina::fuzz
