// A channel as it would be over a slower network of the same host: every ATTEND arrives later.
#pragma once

#include <memory>

#include "transport/channel.h"

namespace lamina {

// Delivers each ATTEND `latency` after its sender posted it, by the header's time, and all else as it comes. Latency, not
// bandwidth: frames that are on their way at the same time do not delay each other. Waiting takes no CPU. For
// experiments; both ends must share one clock.
class DelayedChannel final : public Channel {
 public:
  DelayedChannel(std::shared_ptr<Channel> channel, std::chrono::nanoseconds latency)
      : channel_(std::move(channel)), latency_(latency) {}

  std::span<std::byte> reserve(size_t bytes, Deadline deadline) override {
    return channel_->reserve(bytes, deadline);
  }
  void post() override { channel_->post(); }
  std::span<std::byte> send_memory() override { return channel_->send_memory(); }
  std::span<const std::byte> receive_memory() override { return channel_->receive_memory(); }
  void set_aside(size_t bytes) override { channel_->set_aside(bytes); }
  uint64_t post_at(size_t offset, size_t bytes, Deadline deadline) override {
    return channel_->post_at(offset, bytes, deadline);
  }
  uint64_t num_consumed() override { return channel_->num_consumed(); }
  bool has_frame() override { return channel_->has_frame(); }
  std::span<const std::byte> receive(Deadline deadline) override;
  void release() override {
    arrived_ = {};
    channel_->release();
  }
  size_t max_frame_bytes() const override { return channel_->max_frame_bytes(); }
  uint64_t num_bad_descriptors() const override { return channel_->num_bad_descriptors(); }
  bool peer_closed() const override { return channel_->peer_closed(); }
  void close() override { channel_->close(); }

 private:
  std::shared_ptr<Channel> channel_;
  std::chrono::nanoseconds latency_;
  std::span<const std::byte> arrived_;  // a frame that is not due yet, or not released
  Deadline due_;                        // of it
};

}  // namespace lamina
