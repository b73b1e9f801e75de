// Where frames lie in a ring of memory that one side fills and the other gives back in order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <string>
#include <vector>

#include "base/round_up.h"
#include "transport/channel.h"

namespace lamina {

struct RingExtent {
  size_t offset;
  size_t bytes;  // a multiple of kFrameAlignment
};

class RingSpace {
 public:
  explicit RingSpace(size_t ring_bytes = 0) : ring_bytes_(ring_bytes) {}

  // What a frame takes, with the rest of its last unit. Throws FrameTooLarge for one that never fits.
  size_t padded(size_t bytes) const {
    if (bytes == 0 || bytes > ring_bytes_) {
      throw FrameTooLarge("a frame of " + std::to_string(bytes) + " bytes does not fit the channel's ring of " +
                          std::to_string(ring_bytes_) +
                          " bytes; raise ring_bytes or send fewer tokens per step");
    }
    return round_up(bytes, kFrameAlignment);
  }

  size_t num_frames() const { return in_flight_.size(); }

  // Leaves the last `bytes` to somebody else.
  void set_aside(size_t bytes) { ring_bytes_ -= std::min(ring_bytes_, round_up(bytes, kFrameAlignment)); }
  size_t bytes() const { return ring_bytes_; }

  // Finds the contiguous room of lowest offset: a few frames at a time then use the same, cache-hot memory again and
  // again, whatever the size of the ring. Once no frame is in flight there is room for any that fits the ring.
  bool place(size_t bytes, RingExtent& extent) const {
    extent = {0, bytes};
    for (const RingExtent& used : by_offset_) {
      if (extent.offset + bytes <= used.offset) return true;
      extent.offset = used.offset + used.bytes;
    }
    return extent.offset + bytes <= ring_bytes_;
  }

  // The room that place() found is in use, until as many frames as came before it, and it, are freed.
  void take(RingExtent extent) {
    in_flight_.push_back(extent);
    by_offset_.insert(position_of(extent), extent);
  }
  // A frame that lies elsewhere is sent; it counts among the frames in flight.
  void take_nothing() { in_flight_.push_back({0, 0}); }
  void free_oldest() {
    if (in_flight_.front().bytes > 0) by_offset_.erase(position_of(in_flight_.front()));
    in_flight_.pop_front();
  }

 private:
  std::vector<RingExtent>::const_iterator position_of(RingExtent extent) const {
    return std::ranges::lower_bound(by_offset_, extent.offset, {}, &RingExtent::offset);
  }

  size_t ring_bytes_;
  std::deque<RingExtent> in_flight_;   // in the order in which they were sent
  std::vector<RingExtent> by_offset_;  // the same
};

}  // namespace lamina
