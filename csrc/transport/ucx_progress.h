// Who lets a UCX worker work: the threads that wait for something of it, and a thread of its own while none does.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

#include "transport/channel.h"
#include "transport/ucx_library.h"

namespace lamina {

class UcxProgress {
 public:
  // Taken in turn: a thread that polls lets others have it.
  class TurnMutex {
   public:
    void lock();
    void unlock() { mutex_.unlock(); }
    // Returns when nobody waits for the mutex, or soon after.
    void let_others() const;

   private:
    std::mutex mutex_;
    std::atomic<int> num_waiting_{0};
  };

  // `work`, called with the mutex held, lets the worker progress once and does what follows from it. A wait polls
  // for `spin` before it sleeps. Throws ChannelError if the worker cannot be slept on.
  UcxProgress(const UcxLibrary& library, const UcxWorker& worker, std::chrono::microseconds spin,
              std::function<void()> work);
  ~UcxProgress();
  UcxProgress(const UcxProgress&) = delete;
  UcxProgress& operator=(const UcxProgress&) = delete;

  // Starts the thread of its own: from here on UCX may call back. stop() ends it.
  void start();
  void stop();

  // To be held for each call of UCX and for what its callbacks change.
  TurnMutex& mutex() const { return mutex_; }
  // With the mutex held: something changed that a thread may wait for.
  void changed() { ++num_changes_; }
  // With the mutex held: works once, and wakes threads that sleep if that changed something.
  void work();
  // With the mutex held: wakes every thread that sleeps.
  void wake() { ucx_.ucp_worker_signal(worker_.get()); }
  // Waits until ready(); check() throws once that cannot come any more. Both are called with the mutex held, and
  // check() only after the worker has worked, so that what arrived before the peer left is ready first. Throws
  // ChannelTimeout.
  template <typename Ready, typename Check>
  void wait(Deadline deadline, Ready ready, Check check);

 private:
  static constexpr int kPollsPerYield = 256;

  // Counts this thread as one that waits.
  class Waiting {
   public:
    explicit Waiting(UcxProgress& progress) : progress_(progress) { ++progress_.num_waiting_; }
    ~Waiting() {
      ++progress_.num_waits_;
      --progress_.num_waiting_;
    }

   private:
    UcxProgress& progress_;
  };

  // With the mutex held: whether nothing has arrived that is not worked on, so that one may sleep().
  bool arm() const { return ucx_.ucp_worker_arm(worker_.get()) == ucp::UCS_OK; }
  // Until something arrives, or wake(), or the deadline; or a little while.
  void sleep(Clock::duration at_most) const;
  void run_unattended();

  const UcxLibrary& ucx_;
  const UcxWorker& worker_;
  const std::chrono::microseconds spin_;
  const std::function<void()> work_;
  int event_fd_ = -1;

  mutable TurnMutex mutex_;
  uint64_t num_changes_ = 0;
  std::atomic<int> num_sleeping_{0};
  std::atomic<int> num_waiting_{0};
  std::atomic<uint64_t> num_waits_{0};
  int stop_fd_ = -1;
  std::thread unattended_;
};

template <typename Ready, typename Check>
void UcxProgress::wait(Deadline deadline, Ready ready, Check check) {
  const Waiting waiting(*this);
  const auto done = [&] {
    if (ready()) return true;
    check();
    return false;
  };
  const Deadline spin_end = std::min(deadline, Clock::now() + spin_);
  for (int polls = 1;; ++polls) {
    {
      const std::lock_guard lock(mutex_);
      if (ready()) return;
      work();
      if (done()) return;
    }
    mutex_.let_others();
    if (Clock::now() >= spin_end) break;
    // Lets a peer on the same core run; costs a third of a microsecond where there is none.
    if (polls % kPollsPerYield == 0) sched_yield();
  }
  while (true) {
    Deadline now;
    {
      const std::lock_guard lock(mutex_);
      work();
      if (done()) return;
      now = Clock::now();
      if (now >= deadline) throw ChannelTimeout("the channel's deadline passed");
      if (!arm()) continue;
      ++num_sleeping_;
    }
    sleep(deadline - now);
    --num_sleeping_;
  }
}

}  // namespace lamina
