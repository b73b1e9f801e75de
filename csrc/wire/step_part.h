// The content of a STEP frame: which tokens a worker appends, which rows attend, and where their KV lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "wire/frames.h"

namespace lamina {

// Byte offsets within a STEP payload.
struct StepLayout {
  size_t query_lens = sizeof(StepCounts), kv_lens, block_ids, slot_mapping, bytes;
  StepLayout(size_t num_requests, size_t num_block_ids, size_t num_tokens)
      : kv_lens(query_lens + 4 * num_requests),
        block_ids(kv_lens + 4 * num_requests),
        slot_mapping(round_up(block_ids + 4 * num_block_ids, 8)),
        bytes(slot_mapping + 8 * num_tokens) {}
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

}  // namespace lamina
