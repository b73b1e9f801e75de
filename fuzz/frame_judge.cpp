#include "frame_judge.h"

#include <cstring>
#include <limits>

namespace lamina::fuzz {
namespace {

template <typename T>
T read_at(std::span<const std::byte> bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

}  // namespace

Verdict FrameJudge::judge(std::span<const std::byte> frame) {
  Verdict verdict;
  if (frame.size() < 64) return verdict;
  const auto header = read_at<FrameHeader>(frame, 0);
  if (header.magic != 0x414e4d4c || header.version != 2) return verdict;
  if (header.payload_bytes > frame.size() - 64) return verdict;
  verdict.header = header;
  const auto payload = frame.subspan(64, header.payload_bytes);
  if (header.lane < kMaxLanes) {
    switch (static_cast<int>(header.type)) {
      case 1:
        verdict.accepted = judge_step(header, payload);
        break;
      case 2: {
        const auto answer_payload = judge_attend(header, payload.size());
        verdict.accepted = answer_payload.has_value();
        if (answer_payload && lanes_[header.lane]->rows > 0) {
          verdict.answer = FrameType::kOutput;
          verdict.answer_payload = *answer_payload;
        }
        break;
      }
      case 4:
        verdict.accepted = judge_block_ids(payload, false);
        break;
      case 5:
        verdict.accepted = judge_block_ids(payload, true);
        break;
    }
  }
  if (!verdict.accepted) verdict.answer = FrameType::kError;
  return verdict;
}

bool FrameJudge::judge_step(const FrameHeader& header, std::span<const std::byte> payload) {
  auto& lane = lanes_[header.lane];
  lane.reset();  // a STEP ends the step before it, whether it is good or not
  if (payload.size() < 16) return false;
  const uint64_t requests = read_at<uint32_t>(payload, 0), without_lse = read_at<uint32_t>(payload, 4),
                 tokens = read_at<uint32_t>(payload, 8), ids = read_at<uint32_t>(payload, 12);
  const uint64_t ids_begin = 16 + 8 * requests, slots_begin = (ids_begin + 4 * ids + 7) / 8 * 8;
  if (payload.size() != slots_begin + 8 * tokens) return false;
  uint64_t rows = 0, blocks = 0;
  const auto block_size = static_cast<uint64_t>(geometry_.attention.block_size);
  const auto group =
      static_cast<uint64_t>(geometry_.attention.num_heads / geometry_.attention.num_kv_heads);
  for (uint64_t i = 0; i < requests; ++i) {
    const auto query_len = read_at<int32_t>(payload, 16 + 4 * i);
    const auto kv_len = read_at<int32_t>(payload, 16 + 4 * requests + 4 * i);
    if (query_len < 1 || kv_len < 1) return false;
    rows += static_cast<uint64_t>(query_len);
    blocks += (static_cast<uint64_t>(kv_len) + block_size - 1) / block_size;
    if (rows * group > std::numeric_limits<int32_t>::max() || blocks > ids) return false;
  }
  if (blocks != ids || without_lse > rows) return false;
  for (uint64_t i = 0; i < ids; ++i) {
    const auto id = read_at<int32_t>(payload, ids_begin + 4 * i);
    if (id < 0 || id >= num_blocks_) return false;
  }
  for (uint64_t i = 0; i < tokens; ++i) {
    const auto slot = read_at<int64_t>(payload, slots_begin + 8 * i);
    if (slot < -1 || slot >= num_blocks_ * static_cast<int64_t>(block_size)) return false;
  }
  lane = Lane{header.step, header.generation, rows, without_lse, tokens};
  return true;
}

std::optional<size_t> FrameJudge::judge_attend(const FrameHeader& header, size_t payload_bytes) const {
  const auto& lane = lanes_[header.lane];
  if (!lane || lane->step != header.step || lane->generation != header.generation) return std::nullopt;
  if (header.layer >= geometry_.scales.size()) return std::nullopt;
  const auto to_64 = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const size_t q = lane->rows * geometry_.q_row_bytes(), kv = lane->tokens * geometry_.kv_row_bytes();
  if (payload_bytes != to_64(q) + to_64(kv) + kv) return std::nullopt;
  return to_64(q) + (lane->rows - lane->rows_without_lse) * 4 * geometry_.attention.num_heads;
}

bool FrameJudge::judge_block_ids(std::span<const std::byte> payload, bool pairs) const {
  if (payload.size() % (pairs ? 8 : 4) != 0) return false;
  for (size_t at = 0; at < payload.size(); at += 4) {
    const auto id = read_at<int32_t>(payload, at);
    if (id < 0 || id >= num_blocks_) return false;
  }
  return true;
}

}  // namespace lamina::fuzz
