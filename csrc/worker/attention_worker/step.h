// The attention worker's copy of a STEP: which tokens are appended, which rows attend, and where their KV lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "kernel/attention.h"
#include "wire/model_geometry.h"

namespace lamina {

// A frame that does not hold what its type and its step ask for.
struct MalformedFrame : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a STEP says of one group of layers.
class GroupStep {
 public:
  // Reads a section at the begin of `payload`, and returns its bytes. Throws MalformedFrame.
  size_t read(std::span<const std::byte> payload, const GroupGeometry& group, int32_t num_blocks);
  void clear();

  int32_t num_tokens() const { return static_cast<int32_t>(slot_mapping_.size()); }
  int32_t num_q_rows() const { return num_q_rows_; }
  int32_t num_rows_without_lse() const { return num_rows_without_lse_; }
  const std::vector<AttendRequest>& requests() const { return requests_; }
  const int64_t* slot_mapping() const { return slot_mapping_.data(); }

 private:
  int32_t num_q_rows_ = 0;
  int32_t num_rows_without_lse_ = 0;
  std::vector<int32_t> lens_;  // query_lens, kv_lens
  std::vector<int32_t> block_ids_;
  std::vector<int32_t> positions_, block_positions_;
  std::vector<int64_t> slot_mapping_;
  std::vector<AttendRequest> requests_;
};

// The attention worker's copy, checked against its pool. Reused from step to step, so that a step allocates
// nothing once the vectors have grown.
class Step {
 public:
  // Throws MalformedFrame and leaves the step empty.
  void read(std::span<const std::byte> payload, const ModelGeometry& geometry, int32_t num_blocks);

  const GroupStep& group(int32_t group) const { return groups_[static_cast<size_t>(group)]; }
  // That are appended, in the group that has the most.
  int32_t num_tokens() const;

 private:
  std::vector<GroupStep> groups_;
};

}  // namespace lamina
