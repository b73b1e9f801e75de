#include "transport/shm_channel.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <linux/magic.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#include "base/cpu_pause.h"

namespace lamina {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr uint64_t kMagic = 0x314d4853414e4d4cULL;  // "LMNASHM1"
constexpr size_t kSlots = 64;                       // frames in flight per direction
constexpr size_t kControlBytes = 16384;  // header and both rings' control, before the frames' memory
constexpr int kPausesPerClockRead = 16;
constexpr int kPausesPerYield = 256;
// Longest sleep before the peer's liveness is looked at again: half of the 50 ms in which a dead peer is
// noticed.
constexpr milliseconds kLivenessInterval{25};

struct alignas(64) Header {
  uint64_t magic;
  uint64_t ring_bytes;
};

// Where a frame lies, and the word that publishes it, in one cache line: the receiver polls `sequence`, so
// one line moves between the cores per frame besides the frame itself.
struct alignas(64) Slot {
  std::atomic<uint64_t> sequence;  // n + 1 once frame n is here
  std::atomic<uint64_t> offset;
  std::atomic<uint64_t> bytes;
};

std::system_error system_error(const char* what) {
  return std::system_error(errno, std::generic_category(), what);
}

// The word is shared between processes, hence no FUTEX_PRIVATE_FLAG.
void futex_wait(std::atomic<uint32_t>& word, uint32_t expected, nanoseconds timeout) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
  const timespec relative{seconds.count(), (timeout - seconds).count()};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, expected, &relative, nullptr, 0);
}

// Wakes the peer if it sleeps on `waiting`. The fence orders the caller's publishing store before the load of
// `waiting`; wait() has the mirror image (store `waiting`, fence, load what is published), so at least one of
// the two sees the other and no wake-up is lost.
void wake(std::atomic<uint32_t>& waiting) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (waiting.load(std::memory_order_relaxed) == 0) return;
  waiting.store(0, std::memory_order_relaxed);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&waiting), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free,
              "atomics in shared memory must be lock-free");

}  // namespace

// Control words of one direction. Each word that one side polls while the other writes has a cache line of
// its own.
struct ShmChannel::Ring {
  alignas(64) std::atomic<uint64_t> consumed;  // frames the receiver gave back
  alignas(64) std::atomic<uint32_t> receiver_waiting;
  alignas(64) std::atomic<uint32_t> sender_waiting;
  Slot slots[kSlots];
};

int create_shm_memory(size_t ring_bytes) {
  ring_bytes = round_up(std::max<size_t>(ring_bytes, 1), 4096);
  const int fd = memfd_create("vllm-lamina channel", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) throw system_error("memfd_create");
  const Header header{kMagic, ring_bytes};
  // A new memfd reads as zeros, which is the empty state of both rings. Sealed, so that neither side can
  // shrink it under the other's feet (SIGBUS).
  if (ftruncate(fd, static_cast<off_t>(kControlBytes + 2 * ring_bytes)) != 0 ||
      pwrite(fd, &header, sizeof header, 0) != static_cast<ssize_t>(sizeof header) ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    const auto error = system_error("cannot make the channel's shared memory");
    ::close(fd);
    throw error;
  }
  return fd;
}

ShmChannel::ShmChannel(int memory_fd, int liveness_fd, ShmEnd end, int spin_us) : spin_(spin_us) {
  static_assert(sizeof(Header) + 2 * sizeof(Ring) <= kControlBytes);
  Header header{};
  struct stat status{};
  struct statfs file_system{};
  const int seals = fcntl(memory_fd, F_GET_SEALS);
  // Memory on huge pages of its own kind would be refused at its first use, by SIGBUS, where none are left.
  if (fstat(memory_fd, &status) != 0 || fstatfs(memory_fd, &file_system) != 0 ||
      file_system.f_type != TMPFS_MAGIC || seals < 0 || (seals & F_SEAL_SHRINK) == 0 ||
      pread(memory_fd, &header, sizeof header, 0) != static_cast<ssize_t>(sizeof header) ||
      header.magic != kMagic) {
    throw ChannelError("the descriptor does not hold the memory of a channel of this version");
  }
  const auto file_bytes = static_cast<uint64_t>(status.st_size);
  if (header.ring_bytes == 0 || header.ring_bytes % 4096 != 0 || header.ring_bytes > file_bytes ||
      file_bytes != kControlBytes + 2 * header.ring_bytes) {
    throw ChannelError("the channel's memory has not the size that its header claims");
  }
  ring_bytes_ = header.ring_bytes;
  space_ = RingSpace(ring_bytes_);
  map_bytes_ = file_bytes;
  liveness_fd_ = fcntl(liveness_fd, F_DUPFD_CLOEXEC, 0);
  if (liveness_fd_ < 0) throw system_error("cannot duplicate the channel's liveness descriptor");
  void* map = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory_fd, 0);
  if (map == MAP_FAILED) {
    const auto error = system_error("cannot map the channel's shared memory");
    ::close(liveness_fd_);
    throw error;
  }
  // A forked child has no business here, and copying the page tables of a large ring would slow the fork.
  madvise(map, map_bytes_, MADV_DONTFORK);
  map_ = static_cast<std::byte*>(map);

  auto* rings = reinterpret_cast<Ring*>(map_ + sizeof(Header));
  std::byte* data = map_ + kControlBytes;
  const int sending = end == ShmEnd::kClient ? 0 : 1;
  send_ring_ = &rings[sending];
  send_data_ = data + static_cast<size_t>(sending) * ring_bytes_;
  receive_ring_ = &rings[1 - sending];
  receive_data_ = data + static_cast<size_t>(1 - sending) * ring_bytes_;
}

ShmChannel::~ShmChannel() {
  close();
  ::close(liveness_fd_);
  munmap(map_, map_bytes_);
}

bool ShmChannel::peer_closed() const {
  pollfd poll_fd{liveness_fd_, POLLRDHUP, 0};
  return poll(&poll_fd, 1, 0) > 0;
}

// Shuts the connection down, not just this descriptor: the caller may hold others of the same socket.
void ShmChannel::close() { shutdown(liveness_fd_, SHUT_RDWR); }

template <typename Ready>
void ShmChannel::wait(std::atomic<uint32_t>& waiting, Deadline deadline, Ready ready) const {
  if (ready()) return;
  if (spin_.count() > 0) {
    const Deadline spin_end = std::min(deadline, Clock::now() + spin_);
    for (int pauses = 1;; ++pauses) {
      cpu_pause();
      if (ready()) return;
      if (pauses % kPausesPerClockRead != 0) continue;
      if (Clock::now() >= spin_end) break;
      // Lets a peer on the same core run; costs a third of a microsecond where there is none.
      if (pauses % kPausesPerYield == 0) sched_yield();
    }
  }
  while (true) {
    waiting.store(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // pairs with the fence in wake()
    const Deadline now = Clock::now();
    // Looked at before ready(): what the peer published before it left is then visible, and delivered.
    const bool closed = peer_closed();
    if (ready()) break;
    if (closed || now >= deadline) {
      waiting.store(0, std::memory_order_relaxed);
      if (closed) throw ChannelClosed("the peer closed the channel or died");
      throw ChannelTimeout("the channel's deadline passed");
    }
    futex_wait(waiting, 1, std::min<nanoseconds>(kLivenessInterval, deadline - now));
  }
  waiting.store(0, std::memory_order_relaxed);
}

// Forgets the frames that the receiver gave back. The acquire pairs with the release in release(): the
// receiver's reads of a frame come before our writes into the same memory.
void ShmChannel::reclaim() {
  const uint64_t consumed = send_ring_->consumed.load(std::memory_order_acquire);
  if (consumed < reclaimed_ || consumed > posted_) {
    throw ChannelClosed("the peer claims to have received frames that were never sent");
  }
  for (; reclaimed_ < consumed; ++reclaimed_) space_.free_oldest();
}

std::span<std::byte> ShmChannel::reserve(size_t bytes, Deadline deadline) {
  const size_t padded = space_.padded(bytes);
  reserved_bytes_ = 0;
  wait(send_ring_->sender_waiting, deadline, [&] {
    reclaim();
    if (space_.num_frames() == kSlots) return false;
    return space_.place(padded, reserved_);
  });
  reserved_bytes_ = bytes;
  return {send_data_ + reserved_.offset, bytes};
}

void ShmChannel::post() {
  if (reserved_bytes_ == 0) throw std::logic_error("post() without reserve()");
  space_.take(reserved_);
  publish(reserved_.offset, std::exchange(reserved_bytes_, 0));
}

uint64_t ShmChannel::post_at(size_t offset, size_t bytes, Deadline deadline) {
  wait(send_ring_->sender_waiting, deadline, [&] {
    reclaim();
    return space_.num_frames() < kSlots;
  });
  space_.take_nothing();
  return publish(offset, bytes);
}

uint64_t ShmChannel::publish(size_t offset, size_t bytes) {
  Slot& slot = send_ring_->slots[posted_ % kSlots];
  slot.offset.store(offset, std::memory_order_relaxed);
  slot.bytes.store(bytes, std::memory_order_relaxed);
  // Publishes the frame and its place: whoever reads this value with acquire sees both.
  slot.sequence.store(posted_ + 1, std::memory_order_release);
  wake(send_ring_->receiver_waiting);
  return posted_++;
}

uint64_t ShmChannel::num_consumed() {
  reclaim();
  return reclaimed_;
}

bool ShmChannel::has_frame() {
  return receive_ring_->slots[received_ % kSlots].sequence.load(std::memory_order_acquire) == received_ + 1;
}

std::span<const std::byte> ShmChannel::receive(Deadline deadline) {
  while (true) {
    Slot& slot = receive_ring_->slots[received_ % kSlots];
    wait(receive_ring_->receiver_waiting, deadline,
         [&] { return slot.sequence.load(std::memory_order_acquire) == received_ + 1; });
    // Copied before they are checked: the peer may write them at any time.
    const uint64_t offset = slot.offset.load(std::memory_order_relaxed);
    const uint64_t bytes = slot.bytes.load(std::memory_order_relaxed);
    if (bytes > 0 && bytes <= ring_bytes_ && offset <= ring_bytes_ - bytes && offset % kFrameAlignment == 0) {
      return {receive_data_ + offset, bytes};
    }
    num_bad_descriptors_.fetch_add(1, std::memory_order_relaxed);
    release();
  }
}

void ShmChannel::release() {
  // Release: our reads of the frame come before the sender's reuse of its memory.
  receive_ring_->consumed.store(++received_, std::memory_order_release);
  wake(receive_ring_->sender_waiting);
}

}  // namespace lamina
