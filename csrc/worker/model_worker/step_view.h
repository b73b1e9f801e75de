// The model worker's description of a step, before it is divided over the attention workers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace lamina {

// By vLLM's block ids. Requests that decode (one query token each)
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

}  // namespace lamina
