// A reliable, ordered, two-way channel of frames between a model worker and an attention worker.
//
// Frames are written and read in place: the sender fills the span that reserve() returns, the receiver works
// on the span that receive() returns. One thread at a time may send (reserve, post) and one, the same or
// another, may receive (receive, release). At most one frame is reserved and one received at a time.
//
// A sender may also take a part of the memory for itself, and send frames that it, or a device, wrote there: post_at().
//
// Every wait ends at its deadline, and soon after the peer is gone.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>

namespace lamina {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

// Timeouts beyond 30 years, infinity too, mean the same.
inline Deadline deadline_after(double seconds) {
  const std::chrono::duration<double> timeout(std::clamp(seconds, 0.0, 1e9));
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
}

struct ChannelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// The deadline passed; the channel is still usable.
struct ChannelTimeout : ChannelError {
  using ChannelError::ChannelError;
};
// The peer closed the channel or died, or broke the channel's rules.
struct ChannelClosed : ChannelError {
  using ChannelError::ChannelError;
};
// The frame can never fit; the text says which capacity to raise.
struct FrameTooLarge : ChannelError {
  using ChannelError::ChannelError;
};

// Alignment of every frame's first byte.
inline constexpr size_t kFrameAlignment = 64;

class Channel {
 public:
  virtual ~Channel() = default;

  // Contiguous, kFrameAlignment-aligned room for one frame of `bytes`, the caller's until post(). A
  // reservation that is not posted is dropped by the next reserve(). Throws ChannelTimeout, ChannelClosed,
  // FrameTooLarge.
  virtual std::span<std::byte> reserve(size_t bytes, Deadline deadline) = 0;
  // Sends the reserved frame.
  virtual void post() = 0;

  // The memory in which frames are written, and that in which they arrive; for a device that is to reach them.
  virtual std::span<std::byte> send_memory() = 0;
  virtual std::span<const std::byte> receive_memory() = 0;
  // Leaves the last `bytes` of the send memory to the caller; once, before the first frame. reserve() has the rest.
  virtual void set_aside(size_t bytes) = 0;
  // Sends the frame that lies at an offset of the send memory, in what was set aside. Its memory may be written again
  // once num_consumed() exceeds the number that is returned. Throws ChannelTimeout, ChannelClosed.
  virtual uint64_t post_at(size_t offset, size_t bytes, Deadline deadline) = 0;
  // Frames of both kinds that the peer gave back; asked by the thread that sends. Throws ChannelClosed.
  virtual uint64_t num_consumed() = 0;

  // The oldest frame, readable until release(). Frames posted before the peer left are still delivered.
  // Throws ChannelTimeout, ChannelClosed.
  virtual std::span<const std::byte> receive(Deadline deadline) = 0;
  // Gives the received frame's memory back to the sender.
  virtual void release() = 0;
  // Whether receive() returns at once. Throws ChannelClosed.
  virtual bool has_frame() = 0;

  virtual size_t max_frame_bytes() const = 0;
  // Frames that receive() skipped because the peer described them wrongly.
  virtual uint64_t num_bad_descriptors() const = 0;
  virtual bool peer_closed() const = 0;
  // Tells the peer, and every wait on this side, that the channel is closed.
  virtual void close() = 0;
};

}  // namespace lamina
