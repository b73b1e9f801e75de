// Where frames lie in a ring of memory that one side fills and the other gives back in order.
#pragma once

#include <cstddef>
#include <deque>

namespace lamina {

constexpr size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

struct RingExtent {
  size_t offset;
  size_t bytes;  // a multiple of kFrameAlignment
};

class RingSpace {
 public:
  explicit RingSpace(size_t ring_bytes = 0) : ring_bytes_(ring_bytes) {}

  size_t num_frames() const { return in_flight_.size(); }

  // Finds contiguous room. Frames are freed in the order they were sent, so the room is one gap or, while no
  // frame lies before the oldest one, two. An empty ring starts over at offset 0: frames that travel one at a
  // time then use the same, cache-hot memory.
  bool place(size_t bytes, RingExtent& extent) const {
    if (in_flight_.empty()) {
      extent = {0, bytes};
      return bytes <= ring_bytes_;
    }
    const size_t oldest = in_flight_.front().offset;
    const size_t next = in_flight_.back().offset + in_flight_.back().bytes;
    if (in_flight_.back().offset < oldest) {
      extent = {next, bytes};
      return next + bytes <= oldest;
    }
    if (next + bytes <= ring_bytes_) {
      extent = {next, bytes};
      return true;
    }
    extent = {0, bytes};
    return bytes <= oldest;
  }

  // The room that place() found is in use, until as many frames as came before it, and it, are freed.
  void take(RingExtent extent) { in_flight_.push_back(extent); }
  void free_oldest() { in_flight_.pop_front(); }

 private:
  size_t ring_bytes_;
  std::deque<RingExtent> in_flight_;
};

}  // namespace lamina
