// Frames between a model worker and an attention worker: a fixed header, then a payload by type; little
// endian.
//
// STEP         The number of groups, uint64, then a section for each group of layers: StepCounts; query_len int32 [R];
//              kv_len int32 [R]; block ids int32 [B], request after request; if it has positions, those of each request's
//              first query row, int32 [R], and of each block's first token, int32 [B]; padding to 8; slot_mapping
//              int64 [T]. Opens the lane's next step: in layers of this group R requests attend, each query_len rows over
//              the kv_len tokens in its blocks, and T tokens are appended before.
// ATTEND       One layer of the lane's step, by its group's section: q [rows, heads, head size], and unless the layer
//              shares the KV of another, k [T, KV heads, head size] and v [T, KV heads, head size of v], each at a
//              multiple of 64 bytes; v of a latent cache is part of k, and nothing is there. Rows of q, request after
//              request.
// OUTPUT       Answers an ATTEND that has q rows, and echoes its header: out [rows, heads, head size of v], then at a
//              multiple of 64 bytes LSE float32 [rows after the first num_rows_without_lse, heads].
// ZERO_BLOCKS  Block ids int32 [n], to be zeroed at all positions.
// COPY_BLOCKS  Pairs (source, destination) int32 [n, 2], to be copied at all positions, in order.
// ERROR        Text, UTF-8: why a frame of this lane was dropped.
//
// Heads and block ids are the worker's own: where there are several workers, each holds a part of the KV cache.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

#include "base/round_up.h"

namespace lamina {

static_assert(std::endian::native == std::endian::little, "frames are little endian");

inline constexpr uint32_t kFrameMagic = 0x414e4d4c;  // "LMNA"
inline constexpr uint16_t kWireVersion = 3;
inline constexpr uint32_t kMaxLanes = 8;

enum class FrameType : uint16_t {
  kStep = 1,
  kAttend = 2,
  kOutput = 3,
  kZeroBlocks = 4,
  kCopyBlocks = 5,
  kError = 6,
};

struct FrameHeader {
  uint32_t magic = kFrameMagic;
  uint16_t version = kWireVersion;
  FrameType type{};
  uint64_t generation = 0;  // of the model worker's state; replies echo it, stale ones are dropped
  uint64_t step = 0;        // counts up per lane
  uint64_t payload_bytes = 0;
  uint32_t lane = 0;
  uint32_t layer = 0;
  uint64_t service_ns = 0;  // of an OUTPUT: what the attention worker spent on the frame that it answers
  // For tracing, nanoseconds of the steady clock, which the processes of one host share. An ATTEND: when the model worker
  // began to compute what led to it, and when it was sent. A STEP: the same of what followed the last step's layers.
  uint64_t began_ns = 0;
  uint64_t posted_ns = 0;
};
static_assert(sizeof(FrameHeader) == 64);

struct StepCounts {
  uint32_t num_requests;
  uint32_t num_rows_without_lse;
  uint32_t num_tokens;
  uint32_t num_block_ids;
  uint32_t has_positions;  // 1, where a layer of the group needs them; else 0
  uint32_t reserved;
};
static_assert(sizeof(StepCounts) == 24);

// Byte offsets within an ATTEND payload.
struct AttendLayout {
  size_t k, v, bytes;
  AttendLayout(size_t q_bytes, size_t k_bytes, size_t v_bytes)
      : k(round_up(q_bytes, 64)), v(k + round_up(k_bytes, 64)), bytes(v + v_bytes) {}
};

// Byte offsets within an OUTPUT payload.
struct OutputLayout {
  size_t lse, bytes;
  OutputLayout(size_t out_bytes, size_t lse_bytes) : lse(round_up(out_bytes, 64)), bytes(lse + lse_bytes) {}
};

// Header of a frame, or nothing if the frame is not one of this version or shorter than it says. The header
// is copied out: the sender may still write into shared memory, so what was checked must not be read again.
inline std::optional<FrameHeader> read_header(std::span<const std::byte> frame) {
  if (frame.size() < sizeof(FrameHeader)) return std::nullopt;
  FrameHeader header;
  std::memcpy(&header, frame.data(), sizeof header);
  if (header.magic != kFrameMagic || header.version != kWireVersion) return std::nullopt;
  if (header.payload_bytes > frame.size() - sizeof header) return std::nullopt;
  return header;
}

inline std::byte* write_header(std::span<std::byte> frame, const FrameHeader& header) {
  std::memcpy(frame.data(), &header, sizeof header);
  return frame.data() + sizeof header;
}

}  // namespace lamina
