// Paged attention over KV blocks kept in the kernel's own layout: append and attend, with LSE.
//
// One object serves one geometry. The pool of one layer is `num_blocks * block_bytes()` bytes; block b begins at
// `layer + b * block_bytes()`. What lies inside a block is private to the variant.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "kernel/attention_geometry.h"

namespace lamina {

class ThreadPool;

enum class Isa : uint8_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// One request's part of an attend call. All query tokens of the request attend the same `kv_len` tokens (no mask but
// the length), found through `block_table[0 .. ceil(kv_len / block_size))`.
struct AttendRequest {
  int32_t query_start;         // first query token, a row of q and out
  int32_t query_len;           // >= 1
  int32_t kv_len;              // >= 0; 0 gives output 0 and LSE -inf
  const int32_t* block_table;  // block ids
  int32_t position = 0;        // of the first query token; only read where the rule needs positions
  const int32_t* block_positions = nullptr;  // of each block's first token; null: block b begins at b * block_size
};

// What a layer does with scores; constant per layer.
struct ScoreRule {
  float scale = 1;
  float soft_cap = 0;  // 0: none; score = soft_cap * tanh(scale * q.k / soft_cap)
  int32_t window = 0;  // 0: none; a key at position j is seen by the query at position p if j > p - window
  int32_t chunk = 0;   // 0: none; ... if j >= p / chunk * chunk
  std::vector<float> sinks, alibi_slopes;  // by query head, or empty
};

// Where a layer's blocks lie: block b at data + b * stride, stride >= block_bytes().
struct LayerPool {
  std::byte* data;
  size_t stride;
};

class AttentionKernel {
 public:
  virtual ~AttentionKernel() = default;

  virtual Isa isa() const = 0;

  // Bytes of one block of one layer, for K and V of all KV heads, padding included; a multiple of 64.
  virtual size_t block_bytes() const = 0;

  // Stores tokens. k, v: [num_tokens, num_kv_heads, head_size] in dtype, contiguous. Token i goes to block
  // slot_mapping[i] / block_size at offset slot_mapping[i] % block_size; a negative slot is skipped. A token at offset
  // 0 begins a block anew: the whole block is zeroed before it is written, so that no stale NaN survives.
  virtual void append(LayerPool layer, const void* k, const void* v, const int64_t* slot_mapping, int32_t num_tokens,
                      ThreadPool& threads) const = 0;

  // Softmax attention. q, out: [num_query_tokens, num_heads, head_size] in dtype, contiguous; lse, if not null:
  // [num_query_tokens, num_heads] float32, natural logarithm of the softmax denominator including `scale`. Returns early,
  // with out and lse incomplete, once `threads` is cancelled.
  virtual void attend(LayerPool layer, const void* q, const AttendRequest* requests, int32_t num_requests,
                      const ScoreRule& rule, int32_t num_complete_tokens, void* out, float* lse,
                      ThreadPool& threads) const = 0;

  // Copies all of block `from` to block `to` within one layer; they differ.
  void copy_block(LayerPool layer, int32_t from, int32_t to) const;
  void zero_block(LayerPool layer, int32_t block) const;
};

// Variants this CPU can run, best last.
std::vector<Isa> available_isas();
std::string_view isa_name(Isa isa);

// The best variant for this CPU and geometry, or the one asked for. Throws std::invalid_argument, naming the value and
// the limit, for a geometry outside the ranges above and for an Isa that this CPU or dtype cannot use.
std::unique_ptr<AttentionKernel> make_attention_kernel(const AttentionGeometry& geometry,
                                                       std::optional<Isa> isa = std::nullopt);

}  // namespace lamina
