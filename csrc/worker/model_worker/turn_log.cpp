#include "worker/model_worker/turn_log.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <string>
#include <system_error>

namespace lamina {
namespace {

constexpr uint64_t kMagic = 0x4e5255544e4d414cULL;  // "LAMNTURN"
constexpr size_t kTurns = 4096;
constexpr int kMaxRanks = 64;

std::system_error system_error(const char* what) {
  return std::system_error(errno, std::generic_category(), what);
}

}  // namespace

struct TurnLog::Memory {
  std::atomic<uint64_t> magic;
  std::atomic<uint32_t> ranks;  // the last rank that follows, and one
  alignas(64) std::atomic<uint32_t> changes;  // what waiting threads sleep on
  std::atomic<uint64_t> written;
  std::atomic<uint64_t> taken[kMaxRanks];  // by rank
  std::atomic<uint8_t> lanes[kTurns];
};

int TurnLog::create() {
  const int fd = memfd_create("vllm-lamina turns", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) throw system_error("memfd_create");
  const uint64_t magic = kMagic;
  if (ftruncate(fd, sizeof(Memory)) != 0 || pwrite(fd, &magic, sizeof magic, 0) != sizeof magic ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    const auto error = system_error("cannot make the memory of the turn log");
    ::close(fd);
    throw error;
  }
  return fd;
}

TurnLog::TurnLog(int memory_fd, int rank) : rank_(rank) {
  if (rank < 0 || rank >= kMaxRanks) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of at most " + std::to_string(kMaxRanks));
  }
  struct stat status{};
  if (fstat(memory_fd, &status) != 0 || status.st_size != static_cast<off_t>(sizeof(Memory))) {
    throw ChannelError("the descriptor does not hold a turn log of this version");
  }
  void* map = mmap(nullptr, sizeof(Memory), PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
  if (map == MAP_FAILED) throw system_error("cannot map the turn log");
  memory_ = static_cast<Memory*>(map);
  if (memory_->magic.load() != kMagic) {
    munmap(map, sizeof(Memory));
    throw ChannelError("the descriptor does not hold a turn log of this version");
  }
  if (rank > 0) {
    uint32_t ranks = memory_->ranks.load();
    while (ranks < static_cast<uint32_t>(rank) + 1 &&
           !memory_->ranks.compare_exchange_weak(ranks, static_cast<uint32_t>(rank) + 1)) {
    }
  }
}

TurnLog::~TurnLog() { munmap(memory_, sizeof(Memory)); }

void TurnLog::write(int lane) {
  const uint64_t place = memory_->written.load(std::memory_order_relaxed);
  const uint32_t ranks = memory_->ranks.load(std::memory_order_relaxed);
  for (uint32_t rank = 1; rank < ranks; ++rank) {
    if (place - memory_->taken[rank].load(std::memory_order_acquire) >= kTurns) {
      throw ChannelTimeout("rank " + std::to_string(rank) + " of the model does not take its turns");
    }
  }
  memory_->lanes[place % kTurns].store(static_cast<uint8_t>(lane), std::memory_order_relaxed);
  memory_->written.store(place + 1, std::memory_order_release);
  wake();
}

void TurnLog::wake() {
  memory_->changes.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&memory_->changes), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void TurnLog::follow(int lane, Deadline deadline, const std::function<bool()>& take) {
  auto& taken = memory_->taken[rank_];
  while (true) {
    // Read before what is waited for: a change in between then ends the sleep at once.
    const uint32_t changes = memory_->changes.load(std::memory_order_acquire);
    const uint64_t place = taken.load(std::memory_order_acquire);
    if (place < memory_->written.load(std::memory_order_acquire) &&
        memory_->lanes[place % kTurns].load(std::memory_order_relaxed) == static_cast<uint8_t>(lane) && take()) {
      // No other thread takes this turn: it is this lane's.
      taken.store(place + 1, std::memory_order_release);
      return wake();
    }
    const auto left = deadline - Clock::now();
    if (left <= left.zero()) throw ChannelTimeout("rank 0 of the model did not take this lane's turn in time");
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(left);
    const timespec relative{seconds.count(), std::chrono::nanoseconds(left - seconds).count()};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&memory_->changes), FUTEX_WAIT, changes, &relative,
            nullptr, 0);
  }
}

}  // namespace lamina
