// One attention worker's channel, as the lanes share it: frames go out one after the other, replies reach the lane that
// they are for.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "transport/channel.h"
#include "wire/frames.h"

namespace lamina {

class WorkerLink {
 public:
  explicit WorkerLink(std::shared_ptr<Channel> channel) : channel_(std::move(channel)) {}

  const Channel& channel() const { return *channel_; }
  Channel& channel() { return *channel_; }

  // The worker did not take a frame or did not answer, or is gone.
  bool failed() const { return failed_ || channel_->peer_closed(); }

  // The lane opens a step: outputs of earlier ones are dropped from now on. An error is dropped only with its generation:
  // a frame of an earlier step that the worker did not take has lost KV that later steps rely on.
  void open_step(uint32_t lane, uint64_t generation, uint64_t step);

  // Sends a frame of header.payload_bytes. `fill` writes the payload, and may set the header's times.
  template <class Fill>
  void send(FrameHeader& header, Deadline deadline, Fill&& fill) {
    const std::lock_guard lock(send_mutex_);
    const auto frame = watched([&] { return channel_->reserve(sizeof header + header.payload_bytes, deadline); });
    fill(frame.data() + sizeof header);
    write_header(frame, header);
    channel_->post();
  }

  // Sends the frame whose payload lies at an offset of the channel's send memory, in what was set aside, behind room for
  // the header. Returns its number.
  uint64_t send_at(size_t offset, const FrameHeader& header, Deadline deadline);
  // Frames that the worker gave back. Throws ChannelClosed.
  uint64_t num_consumed() {
    const std::lock_guard lock(send_mutex_);
    return channel_->num_consumed();
  }
  // Whether a frame of the worker lies there; one that arrived before it was lost is still delivered.
  bool has_frame() {
    try {
      return channel_->has_frame();
    } catch (const ChannelClosed&) {
      failed_ = true;
      return false;
    }
  }
  void set_failed() { failed_ = true; }

  // Waits for the lane's next reply and lets `take` read it in place. Threads of several lanes may wait here.
  using Take = std::function<void(const FrameHeader&, const std::byte* payload)>;
  void receive(uint32_t lane, Deadline deadline, const Take& take);

 private:
  struct Reply {
    FrameHeader header;
    std::vector<std::byte> payload;
  };
  struct Lane {
    uint64_t generation = 0;
    uint64_t step = 0;
    std::deque<Reply> inbox;  // replies that another lane's thread took off the channel
  };

  bool is_current(const FrameHeader& header) const;
  // A wait for the worker: its end without success is remembered.
  template <class Wait>
  auto watched(Wait&& wait) {
    try {
      return wait();
    } catch (const ChannelTimeout&) {
      failed_ = true;
      throw;
    } catch (const ChannelClosed&) {
      failed_ = true;
      throw;
    }
  }

  const std::shared_ptr<Channel> channel_;
  std::mutex send_mutex_;
  std::atomic<bool> failed_{false};

  std::mutex mutex_;  // guards the rest
  std::condition_variable reply_taken_;
  bool receiving_ = false;  // a thread is at the channel's receiving end
  std::array<Lane, kMaxLanes> lanes_;
};

}  // namespace lamina
