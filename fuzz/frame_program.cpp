#include "frame_program.h"

#include <algorithm>
#include <cstring>

namespace lamina::fuzz {

std::vector<std::byte> frame_of(FrameHeader header, std::span<const std::byte> payload) {
  std::vector<std::byte> frame(sizeof header + payload.size());
  header.payload_bytes = payload.size();
  std::byte* to = write_header(frame, header);
  if (!payload.empty()) std::memcpy(to, payload.data(), payload.size());
  return frame;
}

FrameHeader FrameProgram::header(FrameType type) {
  FrameHeader header;
  header.type = type;
  const uint8_t where = input_.byte();
  header.lane = where % 9 == 8 ? where : where % 9;  // seldom a lane that does not exist
  header.step = where / 9 % 4;
  header.generation = where / 36 % 4 == 3 ? ~0ull : where / 36 % 4;
  return header;
}

StepPart FrameProgram::section(const GroupGeometry& group) {
  StepPart part;
  part.has_positions = group.has_positions;
  const int requests = input_.byte() % 5;
  const int32_t block_size = group.block_size;
  for (int i = 0; i < requests; ++i) {
    part.query_lens.push_back(1 + input_.byte() % 4);
    part.kv_lens.push_back(1 + input_.byte() % (input_.byte() % 4 == 0 ? 3 * block_size : 8));
    const int32_t blocks = (part.kv_lens.back() + block_size - 1) / block_size;
    int32_t position = group.has_positions ? block_size * (input_.byte() % 3) : 0;
    for (int32_t block = 0; block < blocks; ++block) {
      part.block_ids.push_back(input_.byte() % num_blocks_);
      if (group.has_positions) part.block_positions.push_back(position);
      position += block_size * (1 + (group.has_positions && input_.byte() % 8 == 0));
    }
    if (group.has_positions) {
      const int32_t behind = part.block_positions.back() + part.kv_lens.back() - (blocks - 1) * block_size;
      part.positions.push_back(behind - 1 + input_.byte() % 40);
    }
    part.num_rows += static_cast<size_t>(part.query_lens.back());
  }
  const uint8_t lse = input_.byte();
  part.num_rows_without_lse = part.num_rows == 0 ? 0 : lse % (part.num_rows + 1);
  const int tokens = input_.byte() % 8;
  int64_t slot = input_.byte() % (num_blocks_ * block_size);
  for (int i = 0; i < tokens; ++i) {
    const uint8_t hop = input_.byte();
    slot = hop < 160 ? slot + 1 : hop < 180 ? -1 : hop;
    slot = std::min<int64_t>(slot, static_cast<int64_t>(num_blocks_) * block_size - 1);
    part.slot_mapping.push_back(slot);
  }
  return part;
}

std::vector<std::byte> step_payload(std::span<const StepPart> sections) {
  size_t bytes = sizeof(uint64_t);
  for (const StepPart& section : sections) bytes += section.section_bytes();
  std::vector<std::byte> payload(bytes);
  const uint64_t num_groups = sections.size();
  std::memcpy(payload.data(), &num_groups, sizeof num_groups);
  std::byte* to = payload.data() + sizeof num_groups;
  for (const StepPart& section : sections) to = section.write(to);
  return payload;
}

std::vector<std::byte> FrameProgram::step() {
  const FrameHeader frame_header = header(FrameType::kStep);
  std::vector<StepPart> sections;
  for (const GroupGeometry& group : geometry_.groups()) sections.push_back(section(group));
  return frame_of(frame_header, step_payload(sections));
}

std::vector<std::byte> FrameProgram::attend(const FrameJudge& judge) {
  FrameHeader frame_header = header(FrameType::kAttend);
  const uint8_t how = input_.byte();
  size_t rows = how % 7, tokens = how / 7 % 7;
  // Mostly for a lane that is in a step.
  for (uint32_t i = 0; how < 200 && i < kMaxLanes; ++i) {
    if (frame_header.lane < kMaxLanes && judge.lane(frame_header.lane)) break;
    frame_header.lane = i;
  }
  const size_t index = how % geometry_.layers().size();
  const LayerGeometry& layer = geometry_.layers()[index];
  frame_header.layer = how % 16 == 15 ? static_cast<uint32_t>(input_.number()) : static_cast<uint32_t>(index);
  if (frame_header.lane < kMaxLanes && judge.lane(frame_header.lane) && how < 224) {
    const auto& lane = *judge.lane(frame_header.lane);
    frame_header.step = lane.step;
    frame_header.generation = lane.generation;
    rows = std::min<size_t>(lane.of(layer).rows, 24);
    tokens = std::min<size_t>(lane.of(layer).tokens, 8);
  }
  const AttendLayout layout(rows * layer.rows.q, tokens * layer.rows.k, tokens * layer.rows.v);
  // Ordinary floats, NaN, infinities or denormals.
  static constexpr uint32_t kWords[] = {0x3f000000, 0x7fc00000, 0xff800000, 0x00000001, 0x7f7fffff, 0xffffffff};
  std::vector<std::byte> payload(layout.bytes);
  const uint32_t word = kWords[input_.byte() % std::size(kWords)];
  for (size_t at = 0; at + 4 <= payload.size(); at += 4) std::memcpy(payload.data() + at, &word, 4);
  return frame_of(frame_header, payload);
}

std::vector<std::byte> FrameProgram::block_ids(FrameType type) {
  const FrameHeader frame_header = header(type);
  std::vector<int32_t> ids(input_.byte() % 9);
  for (int32_t& id : ids) id = input_.byte() % num_blocks_;
  return frame_of(frame_header, std::as_bytes(std::span(ids)));
}

std::vector<std::byte> FrameProgram::raw() {
  const auto bytes = std::as_bytes(input_.take(input_.byte() % 128));
  if (input_.byte() % 2 == 0) return frame_of(header(static_cast<FrameType>(input_.byte() % 8)), bytes);
  return {bytes.begin(), bytes.end()};
}

// Writes a number of 1, 2, 4 or 8 bytes anywhere, or cuts, extends or repeats the frame.
void FrameProgram::mutate(std::vector<std::byte>& frame) {
  const uint8_t how = input_.byte();
  const size_t at = frame.empty() ? 0 : (input_.byte() * 256u + input_.byte()) % frame.size();
  switch (how % 16) {
    case 0:
      frame.resize(at);
      return;
    case 1:
      frame.resize(std::min(frame.size() + at, kMaxFrameBytes));
      return;
    case 2:
      if (frame.size() * 2 <= kMaxFrameBytes) {
        const auto again = frame;
        frame.insert(frame.end(), again.begin(), again.end());
      }
      return;
  }
  const uint64_t value = input_.number();
  const size_t width = size_t{1} << (how / 16 % 4);
  // Half of the time at the begin, where the header and a STEP's counts are.
  const size_t to = (how / 64 % 2 == 0 ? at % 96 : at) / width * width;
  if (to + width <= frame.size()) std::memcpy(frame.data() + to, &value, width);
}

std::optional<Sent> FrameProgram::next(const FrameJudge& judge) {
  if (input_.empty() || num_frames_ == kMaxFrames) return std::nullopt;
  ++num_frames_;
  const uint8_t what = input_.byte();
  Sent sent;
  switch (what % 8) {
    case 0:
    case 1:
      sent.frame = step();
      break;
    case 2:
    case 3:
    case 4:
      sent.frame = attend(judge);
      break;
    case 5:
      sent.frame = block_ids(FrameType::kZeroBlocks);
      break;
    case 6:
      sent.frame = block_ids(FrameType::kCopyBlocks);
      break;
    case 7:
      sent.frame = raw();
      break;
  }
  for (int mutations = what / 8 % 8; mutations > 4; --mutations) mutate(sent.frame);
  if (what >= 248) {
    sent.lie = RawSender::Lie{input_.number(), input_.number()};
  }
  return sent;
}

}  // namespace lamina::fuzz
