// The client's sending half of a ShmChannel, written by hand: it can say anything about a frame that a hostile peer can
// write into the memory that both ends share.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>

namespace lamina::fuzz {

class RawSender {
 public:
  // Maps the memory of create_shm_memory(ring_bytes) once more. Throws std::system_error.
  RawSender(int memory_fd, size_t ring_bytes);
  ~RawSender();
  RawSender(const RawSender&) = delete;
  RawSender& operator=(const RawSender&) = delete;

  static constexpr uint64_t kSlots = 64;

  // Puts a frame where it truly fits and publishes it; `offset` and `bytes` are said instead of the truth where given.
  // False if the worker gave no room before the timeout.
  struct Lie {
    uint64_t offset, bytes;
  };
  bool send(std::span<const std::byte> frame, const Lie* lie, std::chrono::milliseconds timeout);

  // Claims to have consumed that many of the worker's frames.
  void claim_consumed(uint64_t frames);
  // What the worker sees of the ring.
  std::span<const std::byte> ring() const { return {data_, ring_bytes_}; }
  // Waits until the worker gave back all that was sent.
  bool drained(std::chrono::milliseconds timeout);

 private:
  struct Slot;
  struct Ring;

  std::byte* map_;
  size_t map_bytes_;
  size_t ring_bytes_;
  Ring* to_worker_;
  Ring* from_worker_;
  std::byte* data_;
  uint64_t posted_ = 0;
  size_t next_ = 0;
};

}  // namespace lamina::fuzz
