#include "transport/ucx_progress.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "base/cpu_pause.h"

namespace lamina {
namespace {

using std::chrono::milliseconds;

// Longest sleep before the state is looked at again, should a wake-up get lost.
constexpr milliseconds kLongestSleep{25};
constexpr milliseconds kShortestNap{2};
constexpr milliseconds kLongestNap{8};

}  // namespace

void UcxProgress::TurnMutex::lock() {
  if (mutex_.try_lock()) return;
  num_waiting_.fetch_add(1, std::memory_order_relaxed);
  bool locked = false;
  // The mutex is held for microseconds, a sleep lasts longer.
  for (int i = 0; i < 1000 && !locked; ++i) {
    cpu_pause();
    locked = mutex_.try_lock();
  }
  if (!locked) mutex_.lock();
  num_waiting_.fetch_sub(1, std::memory_order_relaxed);
}

void UcxProgress::TurnMutex::let_others() const {
  for (int i = 0; i < 1000 && num_waiting_.load(std::memory_order_relaxed) > 0; ++i) cpu_pause();
  if (num_waiting_.load(std::memory_order_relaxed) > 0) sched_yield();
}

UcxProgress::UcxProgress(const UcxLibrary& library, const UcxWorker& worker, std::chrono::microseconds spin,
                         std::function<void()> work)
    : ucx_(library), worker_(worker), spin_(spin), work_(std::move(work)) {
  ucx_.check(ucx_.ucp_worker_get_efd(worker_.get(), &event_fd_), "UCX cannot be slept on");
}

UcxProgress::~UcxProgress() { stop(); }

void UcxProgress::start() {
  stop_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (stop_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  unattended_ = std::thread([this] { run_unattended(); });
}

void UcxProgress::stop() {
  if (stop_fd_ < 0) return;
  if (unattended_.joinable()) {
    eventfd_write(stop_fd_, 1);
    unattended_.join();
  }
  ::close(std::exchange(stop_fd_, -1));
}

void UcxProgress::work() {
  const uint64_t before = num_changes_;
  work_();
  if (num_changes_ != before && num_sleeping_ > 0) wake();
}

void UcxProgress::sleep(Clock::duration at_most) const {
  const auto rounded = std::chrono::ceil<milliseconds>(at_most);
  pollfd event{event_fd_, POLLIN, 0};
  poll(&event, 1, static_cast<int>(std::clamp(rounded, milliseconds(0), kLongestSleep).count()));
}

// Keeps frames and credit moving, and the peer's end noticed, while no other thread waits: while the caller
// computes, say. It naps while others wait, or did so a moment ago, for they need the CPU.
void UcxProgress::run_unattended() {
  pollfd events[2] = {{stop_fd_, POLLIN, 0}, {event_fd_, POLLIN, 0}};
  uint64_t waits_seen = 0;
  milliseconds nap = kShortestNap;
  while (true) {
    const uint64_t waits = num_waits_;
    if (num_waiting_ > 0 || waits != waits_seen) {
      nap = waits != waits_seen ? kShortestNap : std::min(2 * nap, kLongestNap);
      waits_seen = waits;
      if (poll(events, 1, static_cast<int>(nap.count())) > 0) return;
      continue;
    }
    {
      const std::lock_guard lock(mutex_);
      work();
      if (!arm()) continue;
    }
    poll(events, 2, static_cast<int>(kLongestSleep.count()));
    if (events[0].revents != 0) return;
  }
}

}  // namespace lamina
