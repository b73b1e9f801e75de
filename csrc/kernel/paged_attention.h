// The paged driver of all variants: addresses blocks, divides the work, merges partial results by LSE.
#pragma once

#include "kernel/attention.h"
#include "kernel/block_layout.h"
#include "kernel/row_ops.h"

namespace lamina {

class PagedAttention final : public AttentionKernel {
 public:
  // `ops` outlives the object.
  PagedAttention(const AttentionGeometry& geometry, Isa isa, BlockLayout layout, const RowOps& ops);

  Isa isa() const override { return isa_; }
  size_t block_bytes() const override { return shape_.region_bytes() * geometry_.num_kv_heads; }
  void append(LayerPool layer, const void* k, const void* v, const int64_t* slot_mapping, int32_t num_tokens,
              ThreadPool& threads) const override;
  void attend(LayerPool layer, const void* q, const AttendRequest* requests, int32_t num_requests,
              const ScoreRule& rule, int32_t num_complete_tokens, void* out, float* lse,
              ThreadPool& threads) const override;

 private:
  const AttentionGeometry geometry_;
  const Isa isa_;
  const BlockShape shape_;
  const int32_t max_rows_;  // of one item
  const RowOps& ops_;
};

}  // namespace lamina
