// Paged attention over KV blocks kept in the kernel's own layout: append and attend, with LSE.
//
// One object serves one geometry. What lies inside a block is private to the variant.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "kernel/attention_geometry.h"
#include "kernel/score_rule.h"

namespace lamina {

class ThreadPool;

enum class Isa : uint8_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// Where the blocks of a layer lie: block b begins at data + b * stride.
struct LayerPool {
  std::byte* data;
  size_t stride;  // bytes, >= block_bytes()

  std::byte* block(int64_t id) const { return data + static_cast<size_t>(id) * stride; }
};

// One request's part of an attend call. All query tokens of the request attend the same `kv_len` tokens, but for those
// that the layer's rule hides from them, found through `block_table[0 .. ceil(kv_len / block_size))`: all of these
// blocks are full but the last.
struct AttendRequest {
  int32_t query_start;         // first query token, a row of q and out
  int32_t query_len;           // >= 1
  int32_t kv_len;              // >= 0
  const int32_t* block_table;  // block ids; those of blocks that no query token sees are not looked at
  // Only read where the rule needs positions.
  int32_t position = 0;                      // of the first query token; the others follow it
  const int32_t* block_positions = nullptr;  // of each block's first token; null: block b begins at b * block_size
};

class AttentionKernel {
 public:
  virtual ~AttentionKernel() = default;

  virtual Isa isa() const = 0;

  // Bytes of one block of one layer, for K and V of all KV heads, padding included; a multiple of 64. Of a latent
  // cache, for K alone.
  virtual size_t block_bytes() const = 0;

  // Stores tokens. k: [num_tokens, num_kv_heads, head_size], v: [num_tokens, num_kv_heads, head_size_v], both in dtype,
  // contiguous. Token i goes to block slot_mapping[i] / block_size at offset slot_mapping[i] % block_size; a negative
  // slot is skipped. A token at offset 0 begins a block anew: the whole block is zeroed before it is written, so that no
  // stale NaN survives. Of a latent cache v is not read.
  virtual void append(LayerPool layer, const void* k, const void* v, const int64_t* slot_mapping, int32_t num_tokens,
                      ThreadPool& threads) const = 0;

  // Softmax attention. q: [num_query_tokens, num_heads, head_size], out: [num_query_tokens, num_heads, head_size_v],
  // both in dtype, contiguous; lse, if not null: [num_query_tokens, num_heads] float32, natural logarithm of the softmax
  // denominator. Query tokens [0, num_complete_tokens) attend here all that there is for them: the rule's sinks are
  // counted in their output and LSE; for all others whoever merges them counts the sinks. Where a query token sees
  // nothing its output is 0, and its LSE is -inf or, if it is complete, the sink. `rule` passes check_score_rule. Returns
  // early, with out and lse incomplete, once `threads` is cancelled.
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
