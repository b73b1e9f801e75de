// Frames on their way into a ring of memory: each comes in pieces, in any order, as a peer's messages describe them.
// The peer may be wrong or hostile: what it says never leads outside of the ring.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "transport/ring_space.h"

namespace lamina {

class FrameArrivals {
 public:
  // Frames that may be on their way at once, or arrived and not released.
  static constexpr size_t kMaxFrames = 64;

  struct Piece {
    uint64_t frame = 0;         // its number, from 0
    uint64_t frame_offset = 0;  // in the ring
    uint64_t frame_bytes = 0;
    uint64_t offset = 0;  // in the frame
    uint64_t bytes = 0;
  };

  explicit FrameArrivals(size_t ring_bytes) : ring_bytes_(ring_bytes) {}

  // Where in the ring the piece's bytes go; arrived() must follow when they are there. Nothing if the piece cannot
  // be: its frame is bad then, unless it was complete before.
  std::optional<size_t> claim(const Piece& piece);
  void arrived(const Piece& piece);

  // Whether the oldest frame that is not released is complete: all of it is in the ring or, if it is bad, nothing
  // of it is on its way any more.
  bool is_complete() const { return oldest().began && oldest().missing == 0; }
  // Of the oldest frame, once it is complete.
  bool is_bad() const { return oldest().bad; }
  RingExtent extent() const { return {oldest().offset, oldest().bytes}; }
  void release();
  uint64_t num_released() const { return num_released_; }

 private:
  struct Frame {
    bool began = false;
    bool bad = false;
    uint64_t offset = 0;
    uint64_t bytes = 0;
    uint64_t unclaimed = 0;  // bytes for which no piece came yet
    uint64_t missing = 0;    // bytes that are not in the ring yet
  };

  const Frame& oldest() const { return frames_[num_released_ % kMaxFrames]; }

  size_t ring_bytes_;
  std::array<Frame, kMaxFrames> frames_{};
  uint64_t num_released_ = 0;
};

}  // namespace lamina
