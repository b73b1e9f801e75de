// Bytes as a program that builds frames: every input of the fuzzer is one, and most of what it builds is nearly right.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "bytes.h"
#include "frame_judge.h"
#include "raw_sender.h"
#include "wire/step_part.h"

namespace lamina::fuzz {

struct Sent {
  std::vector<std::byte> frame;
  std::optional<RawSender::Lie> lie;
};

class FrameProgram {
 public:
  FrameProgram(std::span<const uint8_t> input, const ModelGeometry& geometry, int32_t num_blocks)
      : input_(input), geometry_(geometry), num_blocks_(num_blocks) {}

  // The next frame, given what the frames so far led to; nothing at the end of the program.
  std::optional<Sent> next(const FrameJudge& judge);

  static constexpr size_t kMaxFrames = 40;  // of one program: all fit the rings at once, and so do their answers
  static constexpr size_t kMaxFrameBytes = 16 << 10;

 private:
  std::vector<std::byte> step();
  StepPart section(const GroupGeometry& group);
  std::vector<std::byte> attend(const FrameJudge& judge);
  std::vector<std::byte> block_ids(FrameType type);
  std::vector<std::byte> raw();
  FrameHeader header(FrameType type);
  void mutate(std::vector<std::byte>& frame);

  Bytes input_;
  const ModelGeometry& geometry_;
  int32_t num_blocks_;
  size_t num_frames_ = 0;
};

// The payload of a STEP.
std::vector<std::byte> step_payload(std::span<const StepPart> sections);

// A frame of `header`, whose payload_bytes is set.
std::vector<std::byte> frame_of(FrameHeader header, std::span<const std::byte> payload);

}  // namespace lamina::fuzz
