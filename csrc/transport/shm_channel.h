// Channel over shared memory, between two processes of one host: one ring per direction, polling then
// sleeping.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "transport/channel.h"
#include "transport/ring_space.h"

namespace lamina {

// The two ends differ only in which ring they send into.
enum class ShmEnd { kClient, kWorker };

// Makes the memory of a channel: a memfd, which vanishes with its last user whatever happens to either
// process. Each direction can hold `ring_bytes` of frames; pages are taken as frames touch them. The caller
// owns the descriptor.
int create_shm_memory(size_t ring_bytes);

class ShmChannel final : public Channel {
 public:
  // Maps `memory_fd` (borrowed). `liveness_fd` (duplicated) is a connected stream socket whose hang-up means
  // that the peer is gone. Polls `spin_us` before it sleeps; use 0 where threads outnumber CPUs. Throws
  // ChannelError for memory that does not hold a channel.
  ShmChannel(int memory_fd, int liveness_fd, ShmEnd end, int spin_us);
  ~ShmChannel() override;
  ShmChannel(const ShmChannel&) = delete;
  ShmChannel& operator=(const ShmChannel&) = delete;

  std::span<std::byte> reserve(size_t bytes, Deadline deadline) override;
  void post() override;
  std::span<const std::byte> receive(Deadline deadline) override;
  void release() override;
  bool has_frame() override;
  std::span<std::byte> send_memory() override { return {send_data_, ring_bytes_}; }
  std::span<const std::byte> receive_memory() override { return {receive_data_, ring_bytes_}; }
  void set_aside(size_t bytes) override { space_.set_aside(bytes); }
  uint64_t post_at(size_t offset, size_t bytes, Deadline deadline) override;
  uint64_t num_consumed() override;
  size_t max_frame_bytes() const override { return space_.bytes(); }
  bool peer_closed() const override;
  void close() override;

  uint64_t num_bad_descriptors() const override {
    return num_bad_descriptors_.load(std::memory_order_relaxed);
  }

 private:
  struct Ring;

  void reclaim();
  uint64_t publish(size_t offset, size_t bytes);
  template <typename Ready>
  void wait(std::atomic<uint32_t>& waiting, Deadline deadline, Ready ready) const;

  std::byte* map_ = nullptr;
  size_t map_bytes_ = 0;
  size_t ring_bytes_ = 0;
  int liveness_fd_ = -1;
  std::chrono::microseconds spin_;

  // Sending: what is in flight is remembered here, not read back from memory the peer can write.
  Ring* send_ring_ = nullptr;
  std::byte* send_data_ = nullptr;
  RingSpace space_;
  uint64_t posted_ = 0;
  uint64_t reclaimed_ = 0;
  RingExtent reserved_{};
  size_t reserved_bytes_ = 0;  // as asked for; 0 without a reservation

  // Receiving.
  Ring* receive_ring_ = nullptr;
  const std::byte* receive_data_ = nullptr;
  uint64_t received_ = 0;
  std::atomic<uint64_t> num_bad_descriptors_{0};
};

}  // namespace lamina
