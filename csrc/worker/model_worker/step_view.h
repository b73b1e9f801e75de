// The model worker's description of a step, before it is divided over the attention workers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "wire/model_geometry.h"

namespace lamina {

// What the layers of one group have of a step, by vLLM's block ids.
struct GroupView {
  const int32_t* block_table;             // [num_requests, >= the request's blocks]
  int64_t block_table_stride;             // in elements
  int64_t block_table_width;              // columns
  std::span<const int64_t> slot_mapping;  // [num_tokens], -1 for a token that is not stored
};

// What of a request the attention workers attend in the layers of a group.
struct Attended {
  int32_t num_rows;  // the first query tokens; 0: none sees anything that is cached
  int32_t kv_len;    // tokens in the blocks
  int32_t first_position;            // of the first block's first token
  std::span<const int32_t> blocks;  // ids; those before the first that the first query token sees are left out
};

// Requests that decode (one query token each) come first.
struct StepView {
  int32_t num_decodes;
  std::span<const int32_t> query_lens;    // [num_requests]
  std::span<const int32_t> context_lens;  // [num_requests], tokens already in the cache
  std::vector<GroupView> groups;

  // Throws std::invalid_argument, saying which request is wrong.
  void validate(const ModelGeometry& geometry) const;

  bool decodes(size_t request) const { return request < static_cast<size_t>(num_decodes); }
  // A decode attends its own token too, which is appended first; within a prefill chunk the model worker attends.
  Attended attended(size_t request, const GroupView& view, const GroupGeometry& group) const;
};

}  // namespace lamina
