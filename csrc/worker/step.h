// Metadata of one step of one lane: which tokens are appended, which rows attend, and where their KV lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "kernel/attention.h"

namespace lamina {

// A frame that does not hold what its type and its step ask for.
struct MalformedFrame : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The model worker's description of a step, by vLLM's block ids. Requests that decode (one query token each)
// come first.
struct StepView {
  int32_t num_decodes;
  std::span<const int32_t> query_lens;    // [num_requests]
  std::span<const int32_t> context_lens;  // [num_requests], tokens already in the cache
  const int32_t* block_table;             // [num_requests, >= the request's blocks]
  int64_t block_table_stride;             // in elements
  int64_t block_table_width;              // columns
  std::span<const int64_t> slot_mapping;  // [num_tokens], -1 for a token that is not stored

  // Throws std::invalid_argument, saying which request is wrong.
  void validate(int32_t block_size) const;

  bool decodes(size_t request) const { return request < static_cast<size_t>(num_decodes); }
  // Tokens that the attention workers attend for the request. A decode attends its own token too, which is
  // appended first; within a prefill chunk the model worker attends.
  int32_t kv_len(size_t request) const { return context_lens[request] + (decodes(request) ? 1 : 0); }
  std::span<const int32_t> blocks(size_t request, int32_t block_size) const {
    const auto count = (static_cast<size_t>(kv_len(request)) + block_size - 1) / block_size;
    return {block_table + static_cast<int64_t>(request) * block_table_stride, count};
  }
};

// The content of one worker's STEP frame, by that worker's block ids.
struct StepPart {
  std::vector<int32_t> query_lens;  // of the requests that attend
  std::vector<int32_t> kv_lens;
  std::vector<int32_t> block_ids;
  std::vector<int64_t> slot_mapping;
  size_t num_rows = 0;  // the sum of query_lens
  size_t num_rows_without_lse = 0;

  size_t num_tokens() const { return slot_mapping.size(); }
  size_t payload_bytes() const;
  void write(std::byte* payload) const;
  void clear();
};

// The attention worker's copy, checked against its pool. Reused from step to step, so that a step allocates
// nothing once the vectors have grown.
class Step {
 public:
  // Throws MalformedFrame and leaves the step empty.
  void read(std::span<const std::byte> payload, const AttentionGeometry& geometry, int32_t num_blocks);
  void clear();

  int32_t num_tokens() const { return static_cast<int32_t>(slot_mapping_.size()); }
  int32_t num_q_rows() const { return num_q_rows_; }
  int32_t num_rows_without_lse() const { return num_rows_without_lse_; }
  const std::vector<AttendRequest>& requests() const { return requests_; }
  const int64_t* slot_mapping() const { return slot_mapping_.data(); }

 private:
  void parse(std::span<const std::byte> payload, const AttentionGeometry& geometry, int32_t num_blocks);

  int32_t num_q_rows_ = 0;
  int32_t num_rows_without_lse_ = 0;
  std::vector<int32_t> lens_;  // query_lens, kv_lens
  std::vector<int32_t> block_ids_;
  std::vector<int64_t> slot_mapping_;
  std::vector<AttendRequest> requests_;
};

}  // namespace lamina
