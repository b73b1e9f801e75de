// Metadata of one step of one lane: which tokens are new, what each request attends, and where its KV lies.
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

// The model worker's description. Requests that decode (one query token each) come first.
struct StepView {
  int32_t num_decodes;
  std::span<const int32_t> query_lens;    // [num_requests]
  std::span<const int32_t> context_lens;  // [num_requests], tokens already in the cache
  const int32_t* block_table;             // [num_requests, >= the request's blocks]
  int64_t block_table_stride;             // in elements
  int64_t block_table_width;              // columns
  std::span<const int64_t> slot_mapping;  // [num_tokens], -1 for a token that is not stored

  // Throws std::invalid_argument, saying which request is wrong. Returns the number of block ids to send.
  size_t validate(int32_t block_size) const;
  size_t payload_bytes(size_t num_block_ids) const;
  void write(std::byte* payload, size_t num_block_ids, int32_t block_size) const;
};

// The attention worker's copy, checked against the pool. Reused from step to step, so that a step allocates
// nothing once the vectors have grown.
class Step {
 public:
  // Throws MalformedFrame and leaves the step empty.
  void read(std::span<const std::byte> payload, int32_t block_size, int32_t num_blocks);
  void clear();

  int32_t num_tokens() const { return static_cast<int32_t>(slot_mapping_.size()); }
  int32_t num_decodes() const { return num_decodes_; }
  int32_t num_q_rows() const { return num_q_rows_; }
  int32_t num_prefill_rows() const { return num_q_rows_ - num_decodes_; }
  // The decode requests and the prefill chunks with context, by rows of q.
  const std::vector<AttendRequest>& requests() const { return requests_; }
  const int64_t* slot_mapping() const { return slot_mapping_.data(); }

 private:
  void parse(std::span<const std::byte> payload, int32_t block_size, int32_t num_blocks);

  int32_t num_decodes_ = 0;
  int32_t num_q_rows_ = 0;
  std::vector<int32_t> lens_;  // query_lens, context_lens
  std::vector<int32_t> block_ids_;
  std::vector<int64_t> slot_mapping_;
  std::vector<AttendRequest> requests_;
};

}  // namespace lamina
