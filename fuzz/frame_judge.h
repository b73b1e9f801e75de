// Says what an attention worker must do with a frame, from the text of wire/frames.h and not from the worker's code: the
// two are compared for every frame that is fuzzed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "wire/frames.h"
#include "wire/model_geometry.h"

namespace lamina::fuzz {

struct Verdict {
  bool accepted = false;
  // What is answered: OUTPUT or ERROR with the frame's own lane, layer, step and generation; or nothing.
  std::optional<FrameType> answer;
  FrameHeader header;          // of the frame, where it has one
  size_t answer_payload = 0;   // bytes, of an OUTPUT
};

class FrameJudge {
 public:
  FrameJudge(const ModelGeometry& geometry, int32_t num_blocks) : geometry_(geometry), num_blocks_(num_blocks) {}

  Verdict judge(std::span<const std::byte> frame);

  // Query rows and tokens of the step that a lane is in, by group; nothing if it is in none.
  struct Group {
    uint64_t rows, rows_without_lse, tokens;
  };
  struct Lane {
    uint64_t step, generation;
    std::vector<Group> groups;
    const Group& of(const LayerSpec& layer) const { return groups[static_cast<size_t>(layer.group)]; }
  };
  const std::optional<Lane>& lane(uint32_t index) const { return lanes_[index]; }

 private:
  bool judge_step(const FrameHeader& header, std::span<const std::byte> payload);
  // Takes a section off the payload.
  std::optional<Group> judge_section(int32_t group, std::span<const std::byte>& payload) const;
  std::optional<size_t> judge_attend(const FrameHeader& header, size_t payload_bytes) const;
  bool judge_block_ids(std::span<const std::byte> payload, bool pairs) const;

  const ModelGeometry& geometry_;
  int32_t num_blocks_;
  std::array<std::optional<Lane>, kMaxLanes> lanes_;
};

}  // namespace lamina::fuzz
