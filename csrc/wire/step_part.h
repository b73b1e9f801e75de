// The content of a STEP frame: which tokens a worker appends, which rows attend, and where their KV lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "wire/frames.h"

namespace lamina {

// Byte offsets within one group's section of a STEP payload; `bytes` is a multiple of 8.
struct StepLayout {
  size_t query_lens = sizeof(StepCounts), kv_lens, block_ids, positions, block_positions, slot_mapping, bytes;
  explicit StepLayout(const StepCounts& counts)
      : StepLayout(counts.num_requests, counts.num_block_ids, counts.num_tokens, counts.has_positions != 0) {}

 private:
  StepLayout(size_t num_requests, size_t num_block_ids, size_t num_tokens, bool has_positions)
      : kv_lens(query_lens + 4 * num_requests),
        block_ids(kv_lens + 4 * num_requests),
        positions(block_ids + 4 * num_block_ids),
        block_positions(positions + (has_positions ? 4 * num_requests : 0)),
        slot_mapping(round_up(block_positions + (has_positions ? 4 * num_block_ids : 0), 8)),
        bytes(slot_mapping + 8 * num_tokens) {}
};

// One group's section of one worker's STEP frame, by that worker's block ids.
struct StepPart {
  std::vector<int32_t> query_lens;  // of the requests that attend
  std::vector<int32_t> kv_lens;
  std::vector<int32_t> block_ids;
  std::vector<int32_t> positions;        // of each request's first query row; empty where the group needs none
  std::vector<int32_t> block_positions;  // of each block's first token; likewise
  std::vector<int64_t> slot_mapping;
  bool has_positions = false;
  size_t num_rows = 0;  // the sum of query_lens
  size_t num_rows_without_lse = 0;

  size_t num_tokens() const { return slot_mapping.size(); }
  size_t section_bytes() const { return StepLayout(counts()).bytes; }
  // Returns where the next section begins.
  std::byte* write(std::byte* section) const;
  void clear();

 private:
  StepCounts counts() const;
};

}  // namespace lamina
