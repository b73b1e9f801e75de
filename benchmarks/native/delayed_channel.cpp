#include "delayed_channel.h"

#include <sys/prctl.h>

#include <thread>

#include "wire/frames.h"

namespace lamina {
namespace {

// A sleeping thread is woken this much too late at most; the rest of the wait is spent awake.
constexpr std::chrono::microseconds kWakeUp{60};

}  // namespace

std::span<const std::byte> DelayedChannel::receive(Deadline deadline) {
  if (arrived_.empty()) {
    arrived_ = channel_->receive(deadline);
    due_ = Clock::now();
    const auto header = read_header(arrived_);
    if (header && header->type == FrameType::kAttend) {
      const Deadline posted{std::chrono::nanoseconds(header->posted_ns)};
      due_ = std::min(posted, due_) + latency_;
      prctl(PR_SET_TIMERSLACK, 1000);  // of this thread: the default, 50 us, is as long as what is measured
    }
  }
  std::this_thread::sleep_until(std::min(due_ - kWakeUp, deadline));
  if (deadline < due_) throw ChannelTimeout("the frame is still on its way");
  while (Clock::now() < due_) {
  }
  return arrived_;
}

}  // namespace lamina
