#include "frame_judge.h"

#include <algorithm>
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
  if (header.magic != 0x414e4d4c || header.version != 3) return verdict;
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
        if (answer_payload && lanes_[header.lane]->of(geometry_.layers()[header.layer]).rows > 0) {
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
  const size_t num_groups = geometry_.groups().size();
  if (payload.size() < 8 || read_at<uint64_t>(payload, 0) != num_groups) return false;
  payload = payload.subspan(8);
  Lane step{header.step, header.generation, {}};
  for (size_t group = 0; group < num_groups; ++group) {
    const auto section = judge_section(static_cast<int32_t>(group), payload);
    if (!section) return false;
    step.groups.push_back(*section);
  }
  if (!payload.empty()) return false;
  lane = step;
  return true;
}

std::optional<FrameJudge::Group> FrameJudge::judge_section(int32_t number, std::span<const std::byte>& payload) const {
  uint64_t block_size = 0, heads_per_kv_head = 0;
  bool wants_positions = false;
  for (const LayerGeometry& layer : geometry_.layers()) {
    if (layer.group != number) continue;
    const CacheSpec& cache = geometry_.caches()[static_cast<size_t>(layer.cache)];
    block_size = static_cast<uint64_t>(cache.block_size);
    heads_per_kv_head =
        std::max(heads_per_kv_head, static_cast<uint64_t>(layer.num_heads / cache.num_kv_heads));
    wants_positions |= layer.rule.window > 0 || layer.rule.chunk > 0 || !layer.rule.alibi_slopes.empty();
  }
  if (payload.size() < 24) return std::nullopt;
  const uint64_t requests = read_at<uint32_t>(payload, 0), without_lse = read_at<uint32_t>(payload, 4),
                 tokens = read_at<uint32_t>(payload, 8), ids = read_at<uint32_t>(payload, 12);
  if (read_at<uint32_t>(payload, 16) != (wants_positions ? 1u : 0u)) return std::nullopt;
  const uint64_t ids_begin = 24 + 8 * requests, positions_begin = ids_begin + 4 * ids,
                 block_positions_begin = positions_begin + (wants_positions ? 4 * requests : 0),
                 slots_begin = (block_positions_begin + (wants_positions ? 4 * ids : 0) + 7) / 8 * 8;
  if (payload.size() < slots_begin + 8 * tokens) return std::nullopt;
  constexpr uint64_t kMax = std::numeric_limits<int32_t>::max();
  uint64_t rows = 0, blocks = 0;
  for (uint64_t i = 0; i < requests; ++i) {
    const auto query_len = read_at<int32_t>(payload, 24 + 4 * i);
    const auto kv_len = read_at<int32_t>(payload, 24 + 4 * requests + 4 * i);
    if (query_len < 1 || kv_len < 1) return std::nullopt;
    const uint64_t first = blocks, count = (static_cast<uint64_t>(kv_len) + block_size - 1) / block_size;
    rows += static_cast<uint64_t>(query_len);
    blocks += count;
    if (rows * heads_per_kv_head > kMax || blocks > ids) return std::nullopt;
    if (!wants_positions) continue;
    const int64_t position = read_at<int32_t>(payload, positions_begin + 4 * i);
    if (position < 0 || static_cast<uint64_t>(position) + static_cast<uint64_t>(query_len) > kMax) return std::nullopt;
    for (uint64_t token = 0; token < static_cast<uint64_t>(kv_len); token += block_size) {
      const int64_t begin = read_at<int32_t>(payload, block_positions_begin + 4 * (first + token / block_size));
      const int64_t least =
          token == 0 ? 0
                     : read_at<int32_t>(payload, block_positions_begin + 4 * (first + token / block_size - 1)) +
                           static_cast<int64_t>(block_size);
      if (begin < least) return std::nullopt;
      const auto left = static_cast<int64_t>(static_cast<uint64_t>(kv_len) - token);
      if (left <= static_cast<int64_t>(block_size) && begin + left - 1 > position) return std::nullopt;
    }
  }
  if (blocks != ids || without_lse > rows) return std::nullopt;
  for (uint64_t i = 0; i < ids; ++i) {
    const auto id = read_at<int32_t>(payload, ids_begin + 4 * i);
    if (id < 0 || id >= num_blocks_) return std::nullopt;
  }
  for (uint64_t i = 0; i < tokens; ++i) {
    const auto slot = read_at<int64_t>(payload, slots_begin + 8 * i);
    if (slot < -1 || slot >= num_blocks_ * static_cast<int64_t>(block_size)) return std::nullopt;
  }
  payload = payload.subspan(slots_begin + 8 * tokens);
  return Group{rows, without_lse, tokens};
}

std::optional<size_t> FrameJudge::judge_attend(const FrameHeader& header, size_t payload_bytes) const {
  const auto& lane = lanes_[header.lane];
  if (!lane || lane->step != header.step || lane->generation != header.generation) return std::nullopt;
  if (header.layer >= geometry_.layers().size()) return std::nullopt;
  const LayerGeometry& layer = geometry_.layers()[header.layer];
  const CacheSpec& cache = geometry_.caches()[static_cast<size_t>(layer.cache)];
  const Group& group = lane->of(layer);
  const auto to_64 = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const size_t element = cache.dtype == DType::kFloat32 ? 4 : 2, heads = static_cast<size_t>(layer.num_heads),
               kv_heads = layer.stores ? static_cast<size_t>(cache.num_kv_heads) : 0;
  const auto size = static_cast<size_t>(cache.head_size), size_v = static_cast<size_t>(cache.head_size_v);
  const size_t q = group.rows * heads * size * element, k = group.tokens * kv_heads * size * element,
               v = cache.latent ? 0 : group.tokens * kv_heads * size_v * element;
  if (payload_bytes != to_64(q) + to_64(k) + v) return std::nullopt;
  return to_64(group.rows * heads * size_v * element) + (group.rows - group.rows_without_lse) * 4 * heads;
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
