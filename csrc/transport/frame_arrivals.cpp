#include "transport/frame_arrivals.h"

#include "transport/channel.h"

namespace lamina {

std::optional<size_t> FrameArrivals::claim(const Piece& piece) {
  if (piece.frame < num_released_ || piece.frame - num_released_ >= kMaxFrames) return std::nullopt;
  Frame& frame = frames_[piece.frame % kMaxFrames];
  const bool in_ring = piece.frame_bytes > 0 && piece.frame_bytes <= ring_bytes_ &&
                       piece.frame_offset <= ring_bytes_ - piece.frame_bytes &&
                       piece.frame_offset % kFrameAlignment == 0;
  const bool in_frame = piece.bytes > 0 && piece.bytes <= piece.frame_bytes &&
                        piece.offset <= piece.frame_bytes - piece.bytes;
  const bool complete = frame.began && frame.missing == 0;
  if (!frame.began) {
    frame = {true, false, piece.frame_offset, piece.frame_bytes, piece.frame_bytes, piece.frame_bytes};
  }
  if (!in_ring || !in_frame || frame.offset != piece.frame_offset ||
      frame.bytes != piece.frame_bytes || frame.unclaimed < piece.bytes) {
    // A complete frame may be in use already. Of a bad one nothing more is let in; what was claimed still arrives.
    if (!complete) {
      frame.bad = true;
      frame.missing -= frame.unclaimed;
      frame.unclaimed = 0;
    }
    return std::nullopt;
  }
  frame.unclaimed -= piece.bytes;
  return piece.frame_offset + piece.offset;
}

void FrameArrivals::arrived(const Piece& piece) { frames_[piece.frame % kMaxFrames].missing -= piece.bytes; }

void FrameArrivals::release() {
  frames_[num_released_ % kMaxFrames] = {};
  ++num_released_;
}

}  // namespace lamina
